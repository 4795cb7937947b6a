# SPDX-License-Identifier: Apache-2.0
"""The extension module against the real daemon. ZEROD_DAEMON names its program."""

import gc
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch

from zerod import _zerod

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


@pytest.fixture
def daemon(tmp_path):
    socket = tmp_path / "d.sock"
    process = subprocess.Popen(
        [os.environ["ZEROD_DAEMON"], "--socket", str(socket), "--metrics-listen", "127.0.0.1:0",
         "--log-file", str(tmp_path / "log")]
    )
    address = f"unix:{socket}"
    info = _zerod.ensure_daemon(address=address, job="any", attach_timeout_seconds=20)
    assert info.address == address and info.boot_id and ":" in info.peer_address
    yield address, process
    process.kill()
    process.wait()


def attach(address, dtype="float32", **kwargs):
    config = dict(CONFIG, **({"bf16": {"enabled": True}} if dtype == "bfloat16" else {}))
    arguments = dict(
        address=address,
        job="extension",
        config=json.dumps(config),
        dtype=dtype,
        takeover_seconds=0.2,
        attach_timeout_seconds=20,
        modules=[_zerod.ModuleInfo("", "Model"), _zerod.ModuleInfo("a", "Linear")],
        parameters=[
            _zerod.ParameterInfo("a.weight", [300, 70], True, 0, ["a"]),
            _zerod.ParameterInfo("a.scale", [], modules=["a"]),
            _zerod.ParameterInfo("frozen", (5,), trainable=False, modules=[""]),
        ],
    )
    return _zerod.Client.attach(**{**arguments, **kwargs})


def put(client, parameter, values):
    view = client.parameters[parameter]
    values = values.to(torch.float32).contiguous()
    client.put(view.unit, view.offset, values.data_ptr(), values.numel())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_through_tensors(daemon, dtype):
    client = attach(daemon[0], dtype)
    assert (client.resumed_step, client.step_number, client.initialized) == (0, 1, False)
    assert client.dtype == dtype and client.stage == 3 and client.guard_pages
    client.barrier()
    initial = [torch.randn(300, 70), torch.tensor(2.0), torch.arange(5.0)]
    for i, values in enumerate(initial):
        put(client, i, values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a read-only tensor must not make PyTorch warn
        tensors = [client.parameter_tensor(i) for i in range(3)]
    for i, (tensor, values) in enumerate(zip(tensors, initial)):
        assert tensor.dtype == getattr(torch, dtype) and tensor.shape == values.shape
        assert tensor.data_ptr() == client.parameters[i].address
        client.gather(client.parameters[i].unit)
        assert torch.equal(tensor, values.to(tensor.dtype))
    client.release_all()

    gradient = torch.full((300, 70), 0.5, dtype=getattr(torch, dtype))
    client.land(0, gradient.data_ptr(), dtype)
    client.land(0, gradient.data_ptr(), dtype)
    with pytest.raises(_zerod.InvalidArgument, match="'frozen'"):
        client.land(2, gradient.data_ptr())
    result = client.step([_zerod.Group(0.1)], want_norm=True, blob=b"a\0b")
    assert not result.skipped
    assert math.isclose(result.grad_norm, math.sqrt(300 * 70), rel_tol=1e-4)
    assert client.step_number == 2
    unit = client.parameters[0].unit
    client.gather(unit)
    assert client.held(unit)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert torch.allclose(tensors[0].float(), initial[0] - 0.1, atol=tolerance)
    moment = torch.empty(300, 70)
    client.read(unit, client.parameters[0].offset, moment.data_ptr(), moment.numel(), "exp_avg")
    assert torch.allclose(moment, torch.tensor(0.1))
    assert client.counters().scatter_bytes == 2 * 300 * 70 * 4
    client.detach()
    assert client.closed


def test_tensors_outlive_the_client_and_do_not_keep_it(daemon):
    client = attach(daemon[0])
    client.barrier()
    for i, values in enumerate([torch.ones(300, 70), torch.tensor(3.0), torch.zeros(5)]):
        put(client, i, values)
    tensor = client.parameter_tensor(0)
    client.gather(client.parameters[0].unit)
    with pytest.raises(_zerod.AlreadyExists, match=str(os.getpid())):
        attach(daemon[0])
    client.close()
    client.close()
    gc.collect()
    assert tensor[299, 69].item() == 1.0  # it was held: still mapped, as it was
    with pytest.raises(_zerod.FailedPrecondition, match="closed"):
        client.gather(0)
    del tensor


def test_state_of_the_last_step_comes_back(daemon):
    script = f"""
import sys; sys.path[:0] = {sys.path!r}
import os, signal, extension_test as t, torch
client = t.attach({daemon[0]!r})
client.barrier()
for i, values in enumerate([torch.ones(300, 70), torch.tensor(3.0), torch.zeros(5)]):
    t.put(client, i, values)
client.step([t._zerod.Group(0.1)], blob=b"state")
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script], cwd=os.path.dirname(__file__))
    assert killed.returncode == -signal.SIGKILL
    client = attach(daemon[0])
    assert client.resumed_step == 1 and client.initialized and client.generation > 1
    assert client.client_state() == b"state"


def test_interrupts_end_waits(daemon):
    client = attach(daemon[0], world=2, local_world=2)  # rank 1 never comes
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        client.barrier()
    assert time.monotonic() - start < 5
    timer.join()


def test_waits_let_other_threads_run(daemon):
    client = attach(daemon[0], world=2, local_world=2)
    done = threading.Event()
    failures = []

    def wait():
        try:
            client.barrier()
        except _zerod.Unavailable as error:
            failures.append(error)
        done.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not done.wait(0.2)
    daemon[1].kill()
    assert done.wait(5)
    thread.join()
    assert failures[0].code == "UNAVAILABLE" and "is gone" in str(failures[0])


def test_errors_have_their_class_and_code():
    with pytest.raises(ValueError, match='did you mean "train_batch_size"'):
        _zerod.parse_config('{"train_batch": 8}', 1)
    text = "{train_batch_size: 8, bfloat16: {enabled: true}, gradient_clipping: 'auto'}"
    with pytest.raises(ValueError, match='"auto" cannot be resolved for gradient_clipping'):
        _zerod.parse_config(text, 2)
    parsed = json.loads(_zerod.parse_config(text, 2, values={"gradient_clipping": "0.5"}))
    assert parsed["config"]["train_micro_batch_size_per_gpu"] == 4
    assert parsed["config"]["gradient_clipping"] == 0.5 and parsed["auto"] == ["gradient_clipping"]
    assert parsed["warnings"] == ["bfloat16: is deprecated; its name is now bf16"]
    with pytest.raises(_zerod.InvalidArgument) as error:
        attach("tcp:somewhere")
    assert error.value.code == "INVALID_ARGUMENT" and isinstance(error.value, _zerod.ZerodError)
    with pytest.raises(_zerod.Unavailable, match="nobody.sock"):
        attach("unix:/tmp/nobody.sock", attach_timeout_seconds=0.1)
    with pytest.raises(_zerod.InvalidArgument, match="float8"):
        attach("unix:/tmp/nobody.sock", dtype="float8")
    with pytest.raises(_zerod.InvalidArgument, match="adafactor"):
        attach("unix:/tmp/nobody.sock", groups=["adafactor"])


def test_forked_children_read_and_do_nothing_else(daemon):
    client = attach(daemon[0])
    client.barrier()
    for i, values in enumerate([torch.ones(300, 70), torch.tensor(3.0), torch.zeros(5)]):
        put(client, i, values)
    unit = client.parameters[0].unit
    client.gather(unit)
    tensor = client.parameter_tensor(0)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert tensor.sum().item() == 300 * 70
            with pytest.raises(_zerod.FailedPrecondition, match="forked"):
                client.gather(unit)
            del client, tensor
            gc.collect()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    client.gather(unit)
    client.barrier()
