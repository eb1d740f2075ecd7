"""``megatron-espo parity``: does every parallel layout give the gradient that one rank gives?"""
