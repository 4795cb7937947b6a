# SPDX-License-Identifier: Apache-2.0
"""What Accelerate's launcher asks for. The launcher itself is torchrun's."""

import os

DEEPSPEED_ENVIRONMENT_NAME = os.getenv("DS_ENV_FILE", ".deepspeed_env")


def main(args: object = None) -> None:
    raise NotImplementedError(
        "zerod has no launcher of its own: start the script with torchrun, or with accelerate "
        "launch and `deepspeed_multinode_launcher: standard`"
    )
