"""``megatron-espo parity``: compares every parallel layout's gradient with one rank's."""
