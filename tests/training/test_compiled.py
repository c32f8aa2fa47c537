"""torch.compile of the stacks changes neither names nor, but for rounding, the training."""

import pytest
import torch

from engine_fast.config import EngineConfig
from engine_fast.energies import TeacherEnergy
from engine_fast.training.objectives import EngineObjective
from tests.distributed import engine_worker


def losses(compiled, **settings):
    student, teacher = engine_worker.models()
    names = list(student.state_dict())
    if compiled:
        student.compile_stacks()
        teacher.compile_stacks()
    assert list(student.state_dict()) == names
    objective = EngineObjective(student, TeacherEnergy(teacher), EngineConfig.model_validate(settings))
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    result = []
    for update in range(3):
        batches = [engine_worker.micro_batch(update, number) for number in range(3)]
        objective.prepare(batches, done=0.0)
        optimizer.zero_grad()
        for batch in batches:
            total = objective(batch).total
            total.backward()
            result.append(float(total.detach()))
        optimizer.step()
    return result


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"head_memory": "keep"}, {"head_memory": "recompute"}], ids=str)
def test_compiled_stacks_train_as_eager_ones(settings):
    torch._dynamo.reset()
    assert losses(True, **settings) == pytest.approx(losses(False, **settings), rel=1e-5)
