"""Reward functions, and the pool of processes that runs them."""

from megatron_espo.rewards.functions import RewardFunction
from megatron_espo.rewards.pool import RewardPool
