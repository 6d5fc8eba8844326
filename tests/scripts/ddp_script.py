"""A run on two processes that is terminated while both measure.

As a script, Lightning starts the second process itself, and passes the signal on to it.
"""

import os
import signal
import time
from typing import Any

import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from tests.scripts.deaths import Slow
from tests.scripts.distributed import Ordered, fit, seeded


class Terminated(Slow):
    """Takes its time at step 5, and there sends itself a signal."""

    def __init__(self, *, sends: bool) -> None:
        super().__init__(lingers_at=5, loss_fn=self._loss, steps=[2, 5])
        self.sends, self.count = sends, 0

    def _loss(self, module: Any, batch: Any) -> Tensor:
        if os.path.exists("measuring"):
            self.count += 1
            if self.count == 3:
                if self.sends:
                    os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(2)  # until the other process has its signal too
        return F.cross_entropy(module.net(batch[0]), batch[1])


def main(rank: int, *, sends: bool = True) -> None:
    checkpoint = ModelCheckpoint("root/checkpoints", save_last=True, every_n_train_steps=1)
    ours = [Terminated(sends=sends), checkpoint]
    fit(rank, seeded(Ordered), ours, max_epochs=1, enable_checkpointing=True)


if __name__ == "__main__":
    process = int(os.environ.get("LOCAL_RANK", "0"))
    main(process, sends=process == 0)
