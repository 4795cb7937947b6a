# SPDX-License-Identifier: Apache-2.0
"""Scripts that were written for DeepSpeed, Accelerate and Transformers, in processes of their own
under their own launchers."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import cluster
import pytest
import torch
from safetensors.torch import load_file

SCRIPTS = Path(__file__).parent / "scripts"
BIN = Path(sys.executable).parent
SECONDS_MAX = 240


def command(*arguments: str, nodes=None, shim: bool = True, **variables: str) -> tuple[int, str]:
    """Exit code and output of a command with zerod in DeepSpeed's place."""
    front = [sys.executable, "-m", "zerod.as_deepspeed"] if shim else []
    environment = {key: value for key, value in os.environ.items()
                   if not key.startswith(("ACCELERATE", "TORCHELASTIC", "ZEROD"))}
    environment |= {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
        "PYTHONPATH": str(cluster.ROOT / "client/python"), **variables,
    }
    if nodes:
        environment |= {"ZEROD_ADDRESS": nodes[0].address,
                        "ZEROD_JOB": f"script-{secrets.token_hex(4)}"}
    started = subprocess.Popen([*front, *arguments], env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        output, errors = started.communicate(timeout=SECONDS_MAX)
    except subprocess.TimeoutExpired:
        started.terminate()  # a launcher ends its ranks, where SIGKILL would leave them
        output, errors = started.communicate(timeout=60)
        pytest.fail(f"no end of {arguments} in {SECONDS_MAX} s:\n{output[-3000:]}{errors[-5000:]}")
    return started.returncode, output + errors


def result(code_and_text: tuple[int, str]) -> dict:
    code, text = code_and_text
    lines = [line for line in text.splitlines() if "RESULT {" in line]
    assert code == 0 and lines, text[-5000:]
    return json.loads(lines[-1].partition("RESULT ")[2])


def accelerate(script: str, *flags: str, arguments: dict | None = None, ranks: int = 2, **more):
    launch = [str(BIN / "accelerate"), "launch", "--num_processes", str(ranks),
              "--main_process_port", str(cluster.free_port()), *flags]
    extra = [json.dumps(arguments)] if arguments is not None else []
    return command(*launch, str(SCRIPTS / script), *extra, **more)


def torchrun(script: str, arguments: dict, *flags: str, ranks: int = 2, **more):
    launch = [str(BIN / "torchrun"), "--nproc-per-node", str(ranks),
              "--master-port", str(cluster.free_port()), *flags]
    return command(*launch, str(SCRIPTS / script), json.dumps(arguments), **more)


@pytest.fixture(scope="module")
def nodes():
    with cluster.daemons(1) as running:
        yield running


# --- The package.


def test_names():
    found = result(command(sys.executable, str(SCRIPTS / "names_script.py")))
    assert found["heavy"] == []
    assert found["version"].startswith("0.19.8")
    assert found["schedules"] == ["LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR",
                                  "WarmupCosineLR"]
    for key in ("found", "module", "constructor", "replaced", "cloned", "shared", "optimizer",
                "lamb"):
        assert found[key], key
    assert found["device"] == "cpu" and found["world"] == 1
    assert found["names"] == [".deepspeed_env", "async_io", "cpu", "optim_states"]
    assert found["enum"] == "AVAILABLE"
    words = ["kernel-injected", "tensor parallelism", "pipeline", "sequence parallelism",
             "sequence parallelism", "mpu", "amsgrad", "something_else",
             "deepspeed.comm.allgather_fn"]
    assert all(word in text for word, text in zip(words, found["refused"])), found["refused"]


def test_nothing_is_shadowed_unless_asked():
    assert result(command(sys.executable, str(SCRIPTS / "names_script.py"), shim=False)) == {
        "found": False
    }


def test_kinds_of_optimizers():
    """What programs ask an engine's optimizer for its class."""
    program = """
import json, logging, torch, deepspeed
from deepspeed.ops import __compatible_ops__
from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.torch import required_torch_version

KINDS = (ZeROOptimizer, DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer,
         FP16_Optimizer, FP16_UnfusedOptimizer)
logging.basicConfig(level=logging.INFO, format="%(message)s")
seen = []
for stage, precision, kind in ((0, None, "Adam"), (1, "bf16", "Adam"), (2, None, "Adam"),
                               (3, "fp16", "Adam"), (0, "bf16", "Adam"), (0, "fp16", "Adam"),
                               (0, "fp16", "Lamb")):
    engine, optimizer, *_ = deepspeed.initialize(
        model=torch.nn.Linear(4, 4),
        config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage},
                "optimizer": {"type": kind, "params": {"lr": 1e-3}},
                **({precision: {"enabled": True}} if precision else {})})
    scaler = optimizer.loss_scaler
    assert optimizer.needs_scaler() == (precision == "fp16")
    assert scaler.cur_scale == optimizer.loss_scale == (65536 if precision == "fp16" else 1)
    assert (scaler.cur_iter, scaler.scale_window, scaler.min_scale) == (0, 1000, 1)
    seen.append([[k.__name__ for k in KINDS if isinstance(optimizer, k)],
                 scaler.dynamic_loss_scale])
    assert not hasattr(optimizer, "single_partition_of_fp32_groups")
    with deepspeed.zero.unwrap_model_for_generation(engine) as whole:
        assert whole is engine
    engine.destroy()
refused = []
for use in (lambda: BF16_Optimizer([]), lambda: optimizer.fp32_partitioned_groups_flat,
            lambda: optimizer.optimizer, lambda: optimizer.something_else):
    try:
        use()
    except (NotImplementedError, AttributeError) as error:
        refused.append(str(error))
print('RESULT ' + json.dumps({
    "seen": seen,
    "refused": refused,
    "ops": [__compatible_ops__[CPUAdamBuilder.NAME], __compatible_ops__[AsyncIOBuilder.NAME]],
    "torch": [required_torch_version(min_version=2.0), required_torch_version(max_version="1.9")],
    "other": [isinstance(torch.optim.SGD([torch.ones(1)], 1.0), k) for k in KINDS],
}))
"""
    ran = command(sys.executable, "-c", program)
    found = result(ran)
    zero = "ZeROOptimizer"
    assert found["seen"] == [
        [[], False],
        [[zero, "DeepSpeedZeroOptimizer"], False],
        [[zero, "DeepSpeedZeroOptimizer"], False],
        [[zero, "DeepSpeedZeroOptimizer_Stage3"], True],
        [["BF16_Optimizer"], False],
        [["FP16_Optimizer"], True],
        [["FP16_UnfusedOptimizer"], True],
    ]
    words = ["initialize() alone", "safe_get_full_fp32_param", "no other optimizer", "something"]
    assert all(word in text for word, text in zip(words, found["refused"], strict=True))
    assert ran[1].count("[Rank 0] DeepSpeed info: version=0.19.8+zerod") == len(found["seen"])
    assert found["ops"] == [True, False]
    assert found["torch"] == [True, False] and not any(found["other"])


def test_born_parameters_come_with_a_process_group():
    program = """
import deepspeed, torch
assert not torch.distributed.is_initialized()
with deepspeed.zero.Init():
    print('RESULT ' + '{"world": %d}' % torch.distributed.get_world_size())
"""
    assert result(command(sys.executable, "-c", program)) == {"world": 1}


FORKED = """
import json, multiprocessing, os, signal
import deepspeed, torch

def train(end):
    # Else all children have the name that the command was given.
    os.environ["ZEROD_JOB"] = f"forked-{os.getpid()}"
    deepspeed.initialize(model=torch.nn.Linear(4, 4), config={
        "train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam"}})
    if end == "raise":
        raise ValueError("meant to fail")
    if end == "interrupt":
        try:  # as torch.multiprocessing does
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            pass

codes = []
for end in ("return", "raise", "interrupt"):
    child = multiprocessing.get_context("fork").Process(target=train, args=(end,))
    child.start()
    child.join()
    codes.append(child.exitcode)
print('RESULT ' + json.dumps({"codes": codes}))
"""


def test_a_forked_process_leaves_its_job_when_its_function_returns(nodes):
    before = cluster.metric(nodes[0].metrics, "zerod_jobs")
    assert result(command(sys.executable, "-c", FORKED, nodes=nodes)) == {"codes": [0, 1, 0]}
    # Those that did not come to their end have left their jobs for whoever comes next.
    assert cluster.metric(nodes[0].metrics, "zerod_jobs") == before + 2


def test_three_ways_in(tmp_path):
    program = "import deepspeed, sys; print('AT', deepspeed.__file__)"
    code, path = command("--path")
    assert code == 0
    path = path.strip()
    script = tmp_path / "script.py"
    script.write_text("import zerod; zerod.enable_as_deepspeed()\n" + program)
    for output in (
        command(sys.executable, "-c", program)[1],
        command(sys.executable, "-c", program, shim=False,
                PYTHONPATH=f"{path}:{cluster.ROOT / 'client/python'}")[1],
        command(sys.executable, str(script), shim=False)[1],
    ):
        assert f"AT {path}/deepspeed/__init__.py" in output
    other = tmp_path / "deepspeed.py"
    other.write_text("")
    code, text = command(
        sys.executable, "-c", "import deepspeed, zerod; zerod.enable_as_deepspeed()", shim=False,
        PYTHONPATH=f"{tmp_path}:{cluster.ROOT / 'client/python'}",
    )
    assert code == 1 and f"loaded already, from {other}" in text
    assert command("no-such-command-at-all")[0] == 127
    assert command()[0] == 2


# --- Accelerate.

AMBIGUOUS = """\
compute_environment: LOCAL_MACHINE
deepspeed_config:
  gradient_accumulation_steps: 1
  gradient_clipping: 1.0
  offload_optimizer_device: 'cpu'
  offload_param_device: 'cpu'
  zero3_init_flag: true
  zero3_save_16bit_model: true
  zero_stage: 3
  deepspeed_config_file: 'ds_config.json'
distributed_type: DEEPSPEED
machine_rank: 0
num_machines: 1
num_processes: 2
use_cpu: false
"""
PLAIN = {
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False,
                          "offload_optimizer": {"device": "none"},
                          "offload_param": {"device": "none"}},
    "gradient_clipping": 1.0, "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 10,
    "steps_per_print": 2000000,
}


def test_an_ambiguous_configuration(tmp_path):
    (tmp_path / "ds_config.json").write_text(json.dumps(PLAIN))
    (tmp_path / "accelerate.yaml").write_text(
        AMBIGUOUS.replace("'ds_config.json'", str(tmp_path / "ds_config.json")))
    code, text = accelerate("state_script.py", "--config_file", str(tmp_path / "accelerate.yaml"))
    assert code == 1
    assert "When using `deepspeed_config_file`, the following accelerate config variables will be" \
        " ignored" in text


def test_what_accelerate_makes_of_a_file(tmp_path):
    (tmp_path / "ds_config.json").write_text(json.dumps(PLAIN))
    code, text = accelerate("state_script.py", "--use_deepspeed", "--deepspeed_config_file",
                            str(tmp_path / "ds_config.json"))
    assert code == 0, text
    assert "DistributedType.DEEPSPEED  Backend: gloo" in text and "Num processes: 2" in text
    assert "Mixed precision type: bf16" in text
    assert "'gradient_accumulation_steps': 10, 'steps_per_print': inf, 'fp16': {'enabled': False}" \
        in text


def test_flags_fill_auto_in(tmp_path):
    config = {
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": "auto", "stage3_gather_16bit_weights_on_model_save": "auto",
            "offload_optimizer": {"device": "auto"}, "offload_param": {"device": "auto"}},
        "gradient_clipping": "auto", "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "steps_per_print": 2000000,
    }
    (tmp_path / "ds_config.json").write_text(json.dumps(config))
    code, text = accelerate(
        "state_script.py", "--use_deepspeed", "--deepspeed_config_file",
        str(tmp_path / "ds_config.json"), "--mixed_precision", "fp16", "--zero_stage", "3",
        "--gradient_accumulation_steps", "5", "--gradient_clipping", "1.0",
        "--offload_param_device", "cpu", "--offload_optimizer_device", "nvme",
        "--zero3_save_16bit_model", "true")
    assert code == 0, text
    assert "'stage': 3, 'stage3_gather_16bit_weights_on_model_save': True, 'offload_optimizer': " \
        "{'device': 'nvme'}, 'offload_param': {'device': 'cpu'}}, 'gradient_clipping': 1.0, " \
        "'train_batch_size': 'auto', 'train_micro_batch_size_per_gpu': 'auto', " \
        "'gradient_accumulation_steps': 5, 'steps_per_print': inf, 'fp16': {'enabled': True, " \
        "'auto_cast': True}}" in text


def train(nodes, *flags, ranks: int = 2, **options) -> dict:
    flags = ("--use_deepspeed", *flags)
    return result(accelerate("accelerate_script.py", *flags, arguments=options, ranks=ranks,
                             nodes=nodes))


def test_equals_data_parallel_training_by_accelerate(nodes):
    expected = result(torchrun("accelerate_script.py", {"case": "none", "dropout": 0}, shim=False,
                               ACCELERATE_USE_CPU="true"))
    assert expected["type"] == "DistributedType.MULTI_CPU"
    got = train(nodes, case="b", stage=3, dropout=0)
    assert got["type"] == "DistributedType.DEEPSPEED"
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert got["rates"] == pytest.approx(expected["rates"])


@pytest.mark.parametrize("case, stage, dtype", [("a", 2, "bf16"), ("c", 1, "fp16")])
def test_optimizers_and_schedules_of_the_configuration(nodes, case, stage, dtype):
    got = train(nodes, case=case, stage=stage, dtype=dtype)
    assert len(got["losses"]) == 16 and sum(got["losses"][-4:]) < sum(got["losses"][:4])
    assert max(got["rates"]) == pytest.approx(1e-2) and got["rates"][0] < 1e-3


def test_an_optimizer_of_the_configuration_with_another_schedule(nodes):
    code, text = accelerate("accelerate_script.py", "--use_deepspeed", arguments={"case": "d"},
                            nodes=nodes)
    assert code != 0 and "You can only specify `accelerate.utils.DummyScheduler`" in text


@pytest.mark.parametrize("stage", [2, 3])
def test_save_state_and_load_state(nodes, stage, tmp_path):
    folder = str(tmp_path / "state")
    one = train(nodes, case="a", stage=stage, epochs=1, save=folder, save_at=8)
    assert (tmp_path / "state/pytorch_model/manifest.json").exists()
    two = train(nodes, case="a", stage=stage, epochs=1, load=folder)
    again = train(nodes, case="a", stage=3, epochs=1, load=folder, ranks=1)
    assert sum(two["losses"]) < 0.7 * sum(one["losses"])
    assert again["losses"][0] < one["losses"][0]
    assert two["rates"][0] == one["rates"][-1]


@pytest.mark.parametrize("stage", [2, 3])
def test_moments_of_save_state_and_load_state(nodes, stage, tmp_path):
    """Before the first step, after a load, and in the middle of an accumulation."""
    got = result(accelerate("moments_script.py", "--use_deepspeed", nodes=nodes,
                            arguments={"stage": stage, "folder": str(tmp_path)}))
    assert len({got["begun"], got["between"], got["whole"]}) == 3
    assert got["begun_again"] == got["begun"]
    assert got["from_again"] == got["whole"]  # bit for bit, moments and schedule too
    assert got["past_within"] == got["whole"], "saving must not touch the gradients"
    assert "after engine.step()" in got["load_within"]
    assert got["within"] == got["between"]
    # Accelerate knows that the accumulation was half done: its second half makes the step.
    assert got["from_within"] not in (got["within"], got["whole"])


def test_killed_and_started_again_without_a_checkpoint(nodes):
    """The script begins at its beginning, and comes to the same weights."""
    expected = result(torchrun("accelerate_script.py", {"stage": 2}, nodes=nodes,
                               ACCELERATE_USE_DEEPSPEED="true"))
    code, text = torchrun("accelerate_script.py", {"stage": 2, "kill_at": 9}, "--max-restarts", "2",
                          nodes=nodes, ACCELERATE_USE_DEEPSPEED="true")
    got = result((code, text))
    assert "the script is let run up to there" in text
    assert got["weights"] == expected["weights"]
    assert got["losses"][10:] == expected["losses"][10:]
    assert got["rates"] == expected["rates"]


def test_a_script_that_writes_is_started_again(nodes, tmp_path):
    """What it writes before the job's step reaches neither the job nor what it saved before; and
    where it deletes checkpoints, one is always there."""
    def run(name, *flags, **options):
        options["folder"] = str(tmp_path / name)
        return torchrun("writing_script.py", options, *flags, nodes=nodes)

    expected = result(run("whole"))
    pretrained = str(tmp_path / "whole")
    whole = result(run("more", pretrained=pretrained))
    code, text = run("killed", "--max-restarts", "1", pretrained=pretrained, kill_at=7)
    got = result((code, text))
    assert "GatheredParameters before step 7, where the job stands, changes nothing" in text
    assert got["sums"] == whole["sums"] != expected["sums"]
    assert got["older"] == whole["older"]
    assert got["norms"][0] == "nan torch.Size([8, 4])" and got["norms"][7] == whole["norms"][7]
    present = [line for line in text.splitlines() if line.startswith("CHECKPOINTS False")]
    assert len(present) == 4 and not any(line.endswith("[]") for line in present), present
    manifest = json.loads((tmp_path / "killed/at6/manifest.json").read_text())
    assert manifest["global_steps"] in (6, 7)
    # It goes back, and dies before the next step or one later.
    back = result(run("back", back_at=6))
    assert back["sums"] != expected["sums"]
    for kill_at in (6, 7):
        code, text = run(f"back-{kill_at}", "--max-restarts", "1", back_at=6, kill_at=kill_at)
        assert result((code, text))["sums"] == back["sums"]


# --- The Trainer of Transformers.


@pytest.mark.parametrize("stage", [2, 3])
def test_trainer_with_checkpoint_and_resume(nodes, stage, tmp_path):
    arguments = {"stage": stage, "output": str(tmp_path)}
    whole = result(torchrun("trainer_script.py", arguments, nodes=nodes))
    assert (tmp_path / "final/model.safetensors").exists()
    folder = tmp_path / "checkpoint-4"
    assert (folder / "latest").read_text() == "global_step4"
    rest = result(torchrun("trainer_script.py", arguments | {"resume": True}, nodes=nodes))
    for step in ("5", "6", "7", "8"):
        assert rest["losses"][step] == pytest.approx(whole["losses"][step], rel=1e-5)
        assert rest["rates"][step] == whole["rates"][step]


@pytest.mark.parametrize("stage", [2, 3])
def test_lora(nodes, stage, tmp_path):
    """What is saved of an adapter is what was trained, by every way of saving it."""
    arguments = {"stage": stage, "lora": True, "output": str(tmp_path)}
    got = result(torchrun("trainer_script.py", arguments, nodes=nodes))
    assert len(got["losses"]) == 8
    expected = torch.load(tmp_path / "expected.bin")
    assert len(expected) == 4 and sorted(got["moved"]) == sorted(expected)
    assert got["changed"] == [] and got["whole"]
    saved = load_file(tmp_path / "final/adapter_model.safetensors")
    for state in (torch.load(tmp_path / "trained.bin"), torch.load(tmp_path / "whole.bin"),
                  {name.replace(".weight", ".default.weight"): value
                   for name, value in saved.items()}):
        assert sorted(state) == sorted(expected)
        assert all(torch.equal(value, expected[name]) for name, value in state.items())
    # The checkpoint of the fourth step has others: it is not the last values that lie there.
    earlier = load_file(tmp_path / "checkpoint-4/adapter_model.safetensors")
    assert earlier.keys() == saved.keys()
    assert not any(torch.equal(value, earlier[name]) for name, value in saved.items())


def test_models_that_read_what_is_born(tmp_path):
    got = result(command(sys.executable, str(SCRIPTS / "born_models_script.py"), str(tmp_path),
                         str(cluster.free_port())))
    assert got == {"BertForMaskedLM": True, "Wav2Vec2Model": True}


# --- Experts and generation.


def test_ranks_with_experts_of_their_own(nodes):
    """Their layer a leaf or not, nobody waits for an expert that another rank does not use."""
    expected = result(torchrun("moe_script.py", {"stage": -1}, shim=False,
                               ACCELERATE_USE_CPU="true"))
    for leaf, units in ((True, 4), (False, 10)):
        got = result(torchrun("moe_script.py", {"leaf": leaf}, nodes=nodes,
                              ACCELERATE_USE_DEEPSPEED="true"))
        assert got["units"] == units
        assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert got["sums"] == pytest.approx(expected["sums"], rel=1e-5)


def test_generation_with_ranks_that_end_at_different_times(nodes):
    got = result(torchrun("generate_script.py", {}, nodes=nodes))
    assert got["losses"][-1] < got["losses"][0]
