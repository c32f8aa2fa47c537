"""The memory that training takes, planned before it is paid for."""

from engine_fast.training.plan.activations import Shape
from engine_fast.training.plan.memory import STAGES, TERMS, MemoryPlan, Stage, plan_memory

__all__ = ["STAGES", "TERMS", "MemoryPlan", "Shape", "Stage", "plan_memory"]
