"""Model families: sizes, shard layouts and weight mappings."""
