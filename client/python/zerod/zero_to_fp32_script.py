#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the fp32 weights of the checkpoint beside this file: zero_to_fp32.py --help"""

import sys

try:
    from zerod.zero_to_fp32 import main
except ImportError:
    sys.exit("the package zerod is not installed here; the weights are plain safetensors as well")

if __name__ == "__main__":
    main()
