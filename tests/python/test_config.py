# SPDX-License-Identifier: Apache-2.0
"""Where a configuration may come from, what "auto" becomes, and what the daemon is given."""

import base64
import json
import types

import pytest
import torch
from torch import nn

import cluster
import zoo

BASE = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW"}}


def test_sources(fake, tmp_path):
    from zerod import config

    text = json.dumps(BASE)
    path = tmp_path / "ds.json"
    path.write_text("# a comment\n" + text)
    assert config.read_source(BASE) == text
    assert config.read_source(types.MappingProxyType(BASE)) == text
    assert config.read_source(path) == config.read_source(str(path)) == "# a comment\n" + text
    long = json.dumps(BASE | {"zerod": {"units": [f"layer.{i}?>" for i in range(999)]}})
    for whole in (text, long):
        for encode in (base64.urlsafe_b64encode, base64.b64encode):
            assert config.read_source(encode(whole.encode()).decode()) == whole
    for wrong in ("ds.json", "config", "dsconfig", "", text, str(tmp_path / "none.json"),
                  base64.b64encode(b"[1]").decode(), base64.b64encode(b"\xff{").decode(),
                  path / "x", "A" * 300):
        with pytest.raises(FileNotFoundError, match="neither a file that exists nor base64"):
            config.read_source(wrong)
    with pytest.raises(IsADirectoryError):
        config.read_source(tmp_path)
    with pytest.raises(ValueError, match="config and args.deepspeed_config"):
        config.choose_source(types.SimpleNamespace(deepspeed_config="x"), BASE, None)


def test_values_that_scripts_put_into_a_dict(fake):
    numpy = pytest.importorskip("numpy")
    from zerod import config

    given = {"torch_autocast": types.MappingProxyType({"dtype": torch.bfloat16}),
             "train_batch_size": numpy.int64(8), "gradient_clipping": numpy.float32(0.5),
             "optimizer": {"params": {"lr": torch.tensor(0.25)}}}
    assert json.loads(config.read_source(given)) == {
        "torch_autocast": {"dtype": "bfloat16"}, "train_batch_size": 8, "gradient_clipping": 0.5,
        "optimizer": {"params": {"lr": 0.25}}}
    with pytest.raises(TypeError, match="the configuration has .*, of type one, which is not"):
        config.read_source({"optimizer": type("one", (), {})()})


class Configured(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.config = config

    def forward(self, x):
        return self.layer(x)


class Peft(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_model = base

    def get_base_model(self):
        return self.base_model


def test_hidden_sizes_of_models(fake):
    from zerod.auto_values import hidden_sizes

    def of(**attributes):
        return Configured(types.SimpleNamespace(**attributes))

    class Refusing:
        @property
        def hidden_size(self):
            raise RuntimeError

    text = types.SimpleNamespace(hidden_size=64)
    assert hidden_sizes(of(hidden_size=768)) == [768]
    assert hidden_sizes(of(hidden_sizes=[64, 320, 128])) == [64, 320, 128]
    assert hidden_sizes(of(hidden_size=768, hidden_sizes=[1], text_config=text)) == [768]
    assert hidden_sizes(of(text_config=text)) == [64]
    assert hidden_sizes(of(text_config=types.SimpleNamespace(hidden_sizes=(1, 2)))) == [1, 2]
    assert hidden_sizes(Configured({"hidden_size": 32})) == [32]
    assert hidden_sizes(Configured({"text_config": {"hidden_size": 16}})) == [16]
    for nothing in (of(), of(hidden_size=None), of(hidden_size="768"), of(hidden_size=True),
                    of(hidden_size=-1), of(hidden_size=0), of(hidden_sizes=[]),
                    of(hidden_sizes=[1, "2"]), Configured(None), Configured(Refusing()),
                    Configured(nn.Linear(1, 1)), nn.Linear(1, 1)):
        assert hidden_sizes(nothing) == []
    inner = of(hidden_size=5)
    assert hidden_sizes(nn.DataParallel(inner)) == [5]
    assert hidden_sizes(Peft(nn.DataParallel(inner))) == [5]
    assert hidden_sizes(torch.compile(inner, backend="eager")) == [5]
    loop = Peft(nn.Linear(1, 1))
    loop.get_base_model = lambda: loop
    assert hidden_sizes(loop) == []
    wants_more = Configured(None)
    wants_more.get_base_model = lambda name: None
    assert hidden_sizes(wants_more) == []


def test_initialize_gives_what_it_knows(fake):
    import zerod

    model = Configured(types.SimpleNamespace(hidden_size=6))
    zerod.initialize(model=model, config=BASE)
    assert fake.auto_values == {"hidden_sizes": [6], "values": {}}
    model = Configured(None)
    optimizer = torch.optim.AdamW(
        [{"params": [model.layer.weight], "lr": 0.5}, {"params": [model.layer.bias]}], lr=0.25,
        weight_decay=0.1,
    )
    zerod.initialize(model=model, optimizer=optimizer, config={"train_micro_batch_size_per_gpu": 1})
    assert fake.auto_values["hidden_sizes"] == []
    assert {key: json.loads(text) for key, text in fake.auto_values["values"].items()} == {
        "optimizer.params.lr": 0.25, "optimizer.params.betas": [0.9, 0.999],
        "optimizer.params.eps": 1e-8, "optimizer.params.weight_decay": 0.1,
        "scheduler.params.warmup_max_lr": [0.5, 0.25],
    }


def test_warnings_are_logged_by_rank_0(fake, caplog):
    import zerod

    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"},
              "bfloat16": {"enabled": True}}
    engine, *_ = zerod.initialize(model=zoo.Stack(), config=config)
    lines = [r.message for r in caplog.records if r.name == "zerod" and r.levelname == "WARNING"]
    assert lines == ["the configuration: bfloat16: is deprecated; its name is now bf16"]
    # The daemon is told what the configuration came to, not what was written.
    assert "bfloat16" not in json.loads(engine.client.options["config"])
    assert json.loads(engine.client.options["config"]) == engine.config


@pytest.mark.usefixtures("no_job")
def test_a_loader_is_refused_before_a_job_is_begun(fake):
    import zerod

    with pytest.raises(TypeError, match="pass its dataset"):
        zerod.initialize(model=zoo.Stack(), config=BASE,
                         training_data=torch.utils.data.DataLoader([1, 2]))


def test_a_scheduler_without_an_optimizer_says_so(fake, caplog):
    import zerod

    config = {"train_micro_batch_size_per_gpu": 1, "scheduler": {"type": "WarmupLR"}}
    engine, _, _, scheduler = zerod.initialize(model=zoo.Stack(), config=config)
    assert scheduler is None and '"scheduler" has no effect' in caplog.text


def test_the_real_parser_through_python():
    auto = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": 3,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": "auto"},
            "scheduler": {"type": "CosineAnnealingLR", "params": {"T_max": "auto"}}}
    texts = [json.dumps(auto), json.dumps({"train_batch_size": 1, "my_own_key": {"a": 1}})]

    without, strict = cluster.run_alone("workers:resolve", texts=texts)
    assert "cannot be resolved for train_batch_size, zero_optimization.stage3_param_persistence_" \
        "threshold, scheduler.params.T_max; " in without
    assert "my_own_key: is not a known key" in strict
    resolved, lenient = cluster.run_alone(
        "workers:resolve", texts=texts, deepspeed_file=True, hidden_sizes=[8, 16],
        values={"scheduler.params.T_max": 9},
    )
    assert resolved["train_batch_size"] == 3
    assert resolved["zero_optimization"]["stage3_param_persistence_threshold"] == 160
    assert resolved["scheduler"] == {"type": "CosineAnnealingLR", "params": {"T_max": 9}}
    assert "my_own_key" not in lenient


def test_the_daemon_gets_what_auto_became():
    config = {
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "scheduler": {"type": "WarmupDecayLR", "params": {
            "warmup_min_lr": "auto", "warmup_max_lr": "auto", "total_num_steps": 9}},
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto",
                              "stage3_param_persistence_threshold": "auto"},
    }
    unknown = json.loads(json.dumps(config))
    unknown["optimizer"]["params"]["lr"] = "auto"
    unknown["bf16"] = {"enabled": "auto"}
    with cluster.daemons(1) as nodes:
        got = cluster.run("workers:initialized", nodes, 1, config=config, hidden_size=32)[0]
        refused = cluster.run("workers:initialized", nodes, 1, config=unknown)[0]
    assert got["engine"] == got["daemon"]
    zero = got["daemon"]["zero_optimization"]
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 32 * 32)
    assert zero["stage3_param_persistence_threshold"] == 320
    assert got["daemon"]["train_batch_size"] == 2
    assert got["daemon"]["scheduler"]["params"]["warmup_max_lr"] == 0.01
    assert refused["error"].splitlines() == [
        '"auto" cannot be resolved for bf16.enabled, optimizer.params.lr, '
        "scheduler.params.warmup_max_lr; write the values"]


def test_a_model_in_bf16_and_a_configuration_that_does_not_say_so(fake, caplog):
    """Transformers loads weights in the checkpoint's type; DeepSpeed trains them, with fp32
    masters."""
    import zerod

    def start(model, **more):
        return zerod.initialize(model=model, config=BASE | more, written_for_deepspeed=True)[0]

    engine = start(nn.Linear(2, 2).bfloat16())
    assert engine.bfloat16_enabled()
    assert "all parameters are bfloat16" in caplog.text
    mixed = nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2))
    for model, more in ((mixed, {}), (nn.Linear(2, 2).half(), {})):
        with pytest.raises(zerod.ModelError, match="in a float32 job"):
            start(model, **more)
    with pytest.raises(zerod.ModelError, match="in a float32 job"):
        zerod.initialize(model=nn.Linear(2, 2).bfloat16(), config=BASE)
