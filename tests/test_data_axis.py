"""Copies of a pipeline in processes of their own train as one copy does, from what each process's data loader reads."""

import numpy as np
import pytest
from test_shard_optimizer import KEY, adamw, batch, pipeline
from together import run_code

from vocabpp_jax import train

CODE = """
import numpy as np
from jax.sharding import Mesh
from test_shard_optimizer import KEY, M, adamw, batch, small_model
from vocabpp_jax import Pipeline, make_mesh, schedules, train

mesh = make_mesh(pipe=2)
answers["mesh"] = dict(mesh.shape)
if {turned}:  # stages in different processes, copies in the same
    mesh = Mesh(mesh.devices.T, mesh.axis_names)
pipe = Pipeline(small_model(2, False, 32), schedules.build("1f1b", "vocab-2", p=2, m=M), mesh)
optimizer = adamw(pipe)
state, step = train.init_state(pipe, optimizer, KEY), train.make_step(pipe, optimizer)
answers["losses"] = []
for k in range(3):
    rows = {{name: ids.reshape(-1, ids.shape[-1]) for name, ids in batch(k).items()}}
    if not {turned}:
        half = len(rows["tokens"]) // 2
        rows = {{name: ids[process * half : (process + 1) * half] for name, ids in rows.items()}}
    state, metrics = step(state, pipe.global_batch(rows))
    answers["losses"].append(float(metrics["loss"]))
answers["norm"] = float(metrics["grad_norm"])
"""


@pytest.mark.sampled(2)
@pytest.mark.parametrize("turned", [False, True])
def test_two_processes_with_two_devices_each_train_as_one(turned):
    pipe = pipeline(1)
    optimizer = adamw(pipe)
    state, step, losses = train.init_state(pipe, optimizer, KEY), train.make_step(pipe, optimizer), []
    for k in range(3):
        state, metrics = step(state, batch(k))
        losses.append(float(metrics["loss"]))
    for answer in run_code(CODE.format(turned=turned), devices=2):
        assert answer["mesh"] == {"data": 2, "pipe": 2}
        np.testing.assert_allclose(answer["losses"], losses, rtol=1e-5)
        np.testing.assert_allclose(answer["norm"], float(metrics["grad_norm"]), rtol=1e-5)
