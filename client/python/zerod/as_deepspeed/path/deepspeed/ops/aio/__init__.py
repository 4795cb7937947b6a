# SPDX-License-Identifier: Apache-2.0
"""Asynchronous disk I/O: the daemon's own affair."""

from zerod.as_deepspeed import face


class AsyncIOBuilder:
    """DeepSpeed's builder of its I/O extension. There is nothing to build."""

    NAME = "async_io"

    def is_compatible(self, verbose: bool = False) -> bool:
        return False


_NEVER = {"aio_handle": "disk I/O in the training process"}
__getattr__, __dir__ = face.names(__name__, never=_NEVER)
