# SPDX-License-Identifier: Apache-2.0
"""What a script finds in the package `deepspeed`, as JSON."""

import importlib.metadata
import importlib.util
import json
import sys

result = {"found": importlib.util.find_spec("deepspeed") is not None}
if result["found"]:
    import deepspeed

    result["heavy"] = sorted(
        {"torch", "zerod._zerod", "zerod.engine", "zerod.initialization"} & sys.modules.keys()
    )
    result["version"] = importlib.metadata.version("deepspeed")
    result["schedules"] = deepspeed.runtime.lr_schedules.VALID_LR_SCHEDULES
    import torch
    from deepspeed import DeepSpeedEngine, comm, zero  # noqa: F401
    from deepspeed.accelerator import get_accelerator
    from deepspeed.checkpoint.utils import clone_tensors_for_torch_save
    from deepspeed.launcher.runner import DEEPSPEED_ENVIRONMENT_NAME
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    from deepspeed.ops.aio import AsyncIOBuilder
    from deepspeed.ops.lamb import FusedLamb
    from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion  # noqa: F401
    from deepspeed.runtime.zero import partition_parameters
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum, OffloadStateTypeEnum
    from deepspeed.utils import groups, logger, set_z3_leaf_modules  # noqa: F401

    result["module"] = issubclass(DeepSpeedEngine, torch.nn.Module)
    result["constructor"] = partition_parameters.zero_wrapper_for_fp_tensor_constructor(
        torch.empty, torch.float16) is torch.empty
    partition_parameters.zero_wrapper_for_fp_tensor_constructor = None
    result["replaced"] = partition_parameters.zero_wrapper_for_fp_tensor_constructor is None
    result["device"] = get_accelerator().current_device_name()
    result["names"] = [DEEPSPEED_ENVIRONMENT_NAME, AsyncIOBuilder.NAME, OffloadDeviceEnum.cpu.value,
                       OffloadStateTypeEnum.optim_states.value]
    result["enum"] = partition_parameters.ZeroParamStatus.AVAILABLE.name
    result["world"] = groups._get_data_parallel_world_size()
    view = torch.arange(10.0)[2:4]
    copied = clone_tensors_for_torch_save({"a": [view]})["a"][0]
    result["cloned"] = copied.untyped_storage().nbytes() == 8 and torch.equal(copied, view)

    weight = torch.nn.Parameter(torch.ones(3))
    given = torch.optim.AdamW([weight], lr=0.5, weight_decay=0.25)
    mapped = DeepSpeedCPUAdam(given.param_groups, lr=0.5, weight_decay=0.25, adamw_mode=True)
    result["shared"] = mapped.param_groups[0] is given.param_groups[0]
    result["optimizer"] = isinstance(FusedAdam([weight]), torch.optim.Optimizer)
    lamb = FusedLamb([weight], betas=(0.8, 0.9), max_coeff=3)
    result["lamb"] = lamb.kinds() == ["lamb"] and lamb.param_groups[0]["max_coeff"] == 3

    result["refused"] = []
    for use in (
        lambda: deepspeed.init_inference(None),
        lambda: deepspeed.tp_model_init(model=None, tp_size=2, dtype=None),
        lambda: deepspeed.PipelineModule([]),
        lambda: deepspeed.runtime.sequence_parallel.ulysses_sp.UlyssesSPAttentionHF.register(),
        lambda: groups._get_sequence_parallel_group(),
        lambda: deepspeed.initialize(model=torch.nn.Linear(1, 1), mpu=object(), config={}),
        lambda: DeepSpeedCPUAdam([weight], amsgrad=True),
        lambda: deepspeed.something_else,
        lambda: comm.allgather_fn,
    ):
        try:
            use()
            result["refused"].append("")
        except (NotImplementedError, AttributeError) as error:
            result["refused"].append(str(error))
print("RESULT", json.dumps(result))
