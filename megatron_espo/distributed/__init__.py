"""Start ranks, exchange objects, monitored barriers, checksums, the watchdog."""
