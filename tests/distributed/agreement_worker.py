"""Started by torchrun: facts that are equal pass; then the last rank's differ, and every rank hears of it."""

import json

from engine_fast.config import RuntimeConfig
from engine_fast.distributed import require_agreement, start
from engine_fast.distributed.runtime import leave
from engine_fast.errors import DistributedError

world = start(RuntimeConfig(device="cpu", threads=1))
facts = {"update": 6, "target tokens": 900, "seed": 1, "learning rate": 0.1}
require_agreement(world, facts, "engine, update 7")
heard = ""
try:
    require_agreement(world, facts | {"target tokens": 900 + (world.rank == world.size - 1)}, "engine, update 7")
except DistributedError as error:
    heard = str(error)
everyone = world.gather(heard)
assert len(set(everyone)) == 1, everyone
if world.is_main:
    print("RESULT " + json.dumps(everyone[0]))
leave(0)
