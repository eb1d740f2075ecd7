"""Rewards: functions that judge one response, and the pool of killable processes that runs them."""

from megatron_espo.rewards.functions import RewardFunction
from megatron_espo.rewards.pool import RewardPool

__all__ = ["RewardFunction", "RewardPool"]
