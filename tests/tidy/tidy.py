#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks the tree's own rules: `tidy.py [--root DIR]`, or `tidy.py --self-test`.

Reads every tracked file (every file where there is no git checkout) and prints
`path:line: error: ...`, or `warning` for a soft limit; only errors make it fail. A line that
breaks a rule for a reason says so with the comment `tidy: allow`, on it or alone above it.
"""

import argparse
import ast
import io
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

LINE_COLUMNS_MAX = 100
FILE_LINES_SOFT, FILE_LINES_HARD = 600, 1000
FUNCTION_LINES_SOFT, FUNCTION_LINES_HARD = 70, 120

CPP = {".cc", ".h", ".cu", ".cuh"}
MEASURED = CPP | {".py", ".proto"}
SIGNED = MEASURED | {".cmake", ".sh"}
BINARY = {".png", ".jpg", ".gif", ".ico", ".pdf", ".pt", ".npy", ".bin"}
SKIPPED_FOLDERS = {".git", ".venv", ".demo", "build", "__pycache__", "node_modules"}

# What a folder may include of ours, by the longest prefix that fits. Whatever is not listed
# (tests, bench, examples) may include everything and be included by nothing of these.
DAEMON = {"daemon", "daemon/core", "daemon/fabric", "daemon/metrics", "daemon/engine",
          "daemon/server"}
LAYERS = {
    "base": {"base"},
    "proto": {"proto"},
    "kernels": {"base", "kernels"},
    "storage": {"base", "storage"},
    "daemon/core": {"base", "daemon/core"},
    "daemon/fabric": {"base", "daemon/fabric"},
    "daemon/metrics": {"base", "daemon/metrics"},
    "daemon/engine": {"base", "proto", "kernels", "storage", "daemon/core", "daemon/fabric",
                      "daemon/metrics", "daemon/engine"},
    "daemon/server": DAEMON | {"base", "proto"},
    "daemon": DAEMON | {"base", "proto"},  # main.cc
    "client": {"base", "proto", "client"},
}
OUTER = {"tests", "bench", "examples"}
# Generated and public headers are included without their folder.
INCLUDE_ALIASES = {"zerod/v1/": "proto/zerod/v1/", "zerod/": "client/cpp/include/zerod/"}
CORE_STD_REFUSED = {"thread", "mutex", "shared_mutex", "condition_variable", "future", "fstream",
                    "filesystem", "iostream"}


def is_tool_or_test(path):
    return path.startswith(("tests/", "bench/", "examples/", "scripts/", "tools/", "client/ctl/"))


# (pattern in code without strings and comments, suffixes, where it applies, what to do instead)
FORBIDDEN = [
    (r"(?<![\w.>])(std::)?v?printf\s*\(|(?<![\w.>])(std::)?puts\s*\(|\bstd::cout\b", CPP,
     lambda path: not is_tool_or_test(path), "prints; log, or return an absl::Status"),
    (r"\bsleep_for\b|\bsleep_until\b|(?<![\w.>])(::)?(u|nano)?sleep\s*\(", CPP,
     lambda path: path.startswith("tests/"), "sleeps in a test; wait for a condition"),
    (r"\btime\.sleep\s*\(|(?<![\w.])sleep\s*\(", {".py"},
     lambda path: path.startswith("tests/"), "sleeps in a test; wait for a condition"),
    (r"(?<!operator )\bnew\b(?=\s*[\w:(\[])", CPP, lambda path: True,
     "raw new; use std::make_unique or a container"),
    (r"(?<!operator )(?<!= )(?<!=)\bdelete\b(?=\s*(\[\s*\]\s*)?[\w:(*])", CPP, lambda path: True,
     "raw delete; let an owner free it"),
]


class Report:
    def __init__(self):
        self.lines = []
        self.errors = 0

    def error(self, path, line, what):
        self.errors += 1
        self.lines.append(f"{path}:{line}: error: {what}")

    def warning(self, path, line, what):
        self.lines.append(f"{path}:{line}: warning: {what}")


# ---- Reading code ----------------------------------------------------------------------------

CPP_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|/\*.*?\*/)
      | (?P<raw>R"(?P<tag>[^\s()\\]{0,16})\(.*?\)(?P=tag)")
      | (?P<string>"(?:\\.|[^"\\\n])*")
      | (?P<separator>(?<=[0-9a-fA-F])'(?=[0-9a-fA-F]))
      | (?P<char>'(?:\\.|[^'\\\n])+')""",
    re.S | re.X)


def blank(text):
    """Spaces for every character but the line ends."""
    return re.sub(r"[^\n]", " ", text)


def cpp_code(text):
    """`text` with comments and what is in quotes blanked; lines and columns stay."""

    def replace(match):
        token = match.group()
        if match.lastgroup == "separator":
            return " "
        if match.group("comment"):
            return blank(token)
        return token[0] + blank(token[1:-1]) + token[-1] if len(token) > 1 else token

    return CPP_TOKEN.sub(replace, text)


def python_code(text):
    """`text` with strings and comments blanked, or None where it is not Python."""
    lines = [list(line) for line in text.splitlines(keepends=True)]
    quoted = {tokenize.STRING, tokenize.COMMENT}
    quoted |= {getattr(tokenize, name) for name in ("FSTRING_MIDDLE",) if hasattr(tokenize, name)}
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type not in quoted:
                continue
            (row, column), (row_end, column_end) = token.start, token.end
            for r in range(row, row_end + 1):
                first = column if r == row else 0
                last = column_end if r == row_end else len(lines[r - 1])
                for c in range(first, min(last, len(lines[r - 1]))):
                    if lines[r - 1][c] != "\n":
                        lines[r - 1][c] = " "
    except (tokenize.TokenError, SyntaxError):
        return None
    return "".join("".join(line) for line in lines)


def without_preprocessor(code):
    return re.sub(r"^[ \t]*#(?:[^\n\\]|\\.|\\\n)*", lambda m: blank(m.group()), code,
                  flags=re.M | re.S)


def opens_function(header):
    """Whether a block with this text before its brace, outside of functions, is a function."""
    header = re.sub(r"\b(alignas|__attribute__|decltype|requires)\s*\((?:[^()]|\([^()]*\))*\)", " ",
                    header)
    header = re.sub(r"\btemplate\s*<[^;{}]*?>(?=\s*\w)", " ", header)
    header = re.sub(r"\boperator\s*(\(\)|[^\w\s(]+)", "operator_", header)
    head, parenthesis, _ = header.partition("(")
    return bool(parenthesis) and "=" not in head


ACCESS = {"public", "protected", "private"}


def cpp_functions(code):
    """(first line, number of lines) of each function, lambdas within it included."""
    code = without_preprocessor(code)
    stack = []  # "function", "inner", "scope" or "initializer"
    header_at = None  # where the text before the next brace begins
    started = 0
    depth = 0  # of parentheses
    for i, c in enumerate(code):
        if c == "(":
            depth += 1
        elif c == ")":
            depth = max(0, depth - 1)
        if c == "{":
            if "function" in stack:
                stack.append("inner")
                continue
            if depth > 0 or (i > 0 and re.match(r"[\w>\])]", code[i - 1])):
                stack.append("initializer")  # a_{1}: Google's style has no space there
                continue
            header = code[header_at:i] if header_at is not None else ""
            if opens_function(header):
                stack.append("function")
                started = code.count("\n", 0, header_at) + 1
            else:
                stack.append("scope")
            header_at = None
        elif c == "}":
            kind = stack.pop() if stack else "scope"
            if kind == "function":
                yield started, code.count("\n", 0, i) + 2 - started
            if kind != "initializer":
                header_at = None
        elif c == ";" and depth == 0:
            header_at = None
        elif c == ":" and header_at is not None and code[header_at:i] in ACCESS:
            header_at = None
        elif header_at is None and not c.isspace():
            header_at = i


def python_functions(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.lineno, node.end_lineno - node.lineno + 1


# ---- The rules -------------------------------------------------------------------------------

def layer_of(path):
    fitting = [layer for layer in LAYERS if path.startswith(layer + "/")]
    return max(fitting, key=len, default=None)


def check_include(path, line, quoted, name, report):
    layer = layer_of(path)
    if layer is None:
        return
    if name.startswith("../") or "/../" in name:
        report.error(path, line, f'include "{name}" by its path from the root')
        return
    for alias, folder in INCLUDE_ALIASES.items():
        if name.startswith(alias):
            name = folder + name[len(alias):]
            break
    target = layer_of(name)
    allowed = LAYERS[layer]
    if target is not None and target not in allowed:
        report.error(path, line, f"{layer} must not include {name}; it may include "
                                 f"{', '.join(sorted(allowed))}")
    elif target is None and name.split("/")[0] in OUTER:
        report.error(path, line, f"{layer} must not include {name}, which is not part of zerod")
    elif layer == "daemon/core" and target is None:
        standard = not quoted and "/" not in name and not name.endswith(".h")
        if not name.startswith("absl/") and not standard:
            report.error(path, line, f"{layer} must not include {name}; it may include the "
                                     "standard library, absl, base and itself")
        elif name in CORE_STD_REFUSED:
            report.error(path, line, f"{layer} must not include {name}: no threads, locks or files")


def allowed_lines(lines):
    """Numbers of the lines that `tidy: allow` excuses."""
    excused = set()
    for number, line in enumerate(lines, 1):
        if "tidy: allow" in line:
            excused.add(number)
            if line.lstrip().startswith(("//", "#")):
                excused.add(number + 1)
    return excused


def check_lines(path, lines, excused, report):
    suffix = Path(path).suffix
    for number, line in enumerate(lines, 1):
        if number in excused:
            continue
        if line != line.rstrip():
            report.error(path, number, "space at the end of the line")
        if suffix in MEASURED and len(line) > LINE_COLUMNS_MAX:
            report.error(path, number, f"{len(line)} columns; at most {LINE_COLUMNS_MAX}")
    if suffix in MEASURED and len(lines) > FILE_LINES_HARD:
        report.error(path, len(lines), f"{len(lines)} lines; at most {FILE_LINES_HARD}")
    elif suffix in MEASURED and len(lines) > FILE_LINES_SOFT:
        report.warning(path, len(lines), f"{len(lines)} lines; better below {FILE_LINES_SOFT}")


def check_licence(path, lines, report):
    script = bool(lines) and lines[0].startswith("#!")
    named = Path(path).suffix in SIGNED or Path(path).name == "CMakeLists.txt"
    if lines and (script or named) and not any("SPDX-License-Identifier:" in x for x in lines[:5]):
        report.error(path, 1, "no SPDX-License-Identifier in the first lines")


def check_functions(path, functions, excused, report):
    for line, length in functions:
        if length > FUNCTION_LINES_HARD and line not in excused:
            report.error(path, line, f"a function of {length} lines; at most "
                                     f"{FUNCTION_LINES_HARD}")
        elif length > FUNCTION_LINES_SOFT:
            report.warning(path, line, f"a function of {length} lines; better below "
                                       f"{FUNCTION_LINES_SOFT}")


def check_calls(path, code, excused, report):
    suffix = Path(path).suffix
    for pattern, suffixes, applies, advice in FORBIDDEN:
        if suffix not in suffixes or not applies(path):
            continue
        for match in re.finditer(pattern, code):
            line = code.count("\n", 0, match.start()) + 1
            if line not in excused:
                report.error(path, line, advice)


def check_includes(path, text, code, excused, report):
    """Names are blanked in `code`, which tells an include from a comment about one."""
    lines = text.split("\n")
    for number, line in enumerate(code.split("\n"), 1):
        if number in excused or not re.match(r'\s*#\s*include\b', line):
            continue
        match = re.match(r'\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)', lines[number - 1])
        if match:
            check_include(path, number, match.group(1) is not None,
                          match.group(1) or match.group(2), report)


def check_file(path, text, report):
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    excused = allowed_lines(lines)
    check_lines(path, lines, excused, report)
    check_licence(path, lines, report)
    suffix = Path(path).suffix
    if suffix in CPP:
        code = cpp_code(text)
        check_functions(path, cpp_functions(code), excused, report)
        check_calls(path, without_preprocessor(code), excused, report)
        check_includes(path, text, code, excused, report)
    elif suffix == ".py":
        code = python_code(text)
        if code is None:
            report.error(path, 1, "is not valid Python")
            return
        check_functions(path, python_functions(text), excused, report)
        check_calls(path, code, excused, report)


# ---- The tree --------------------------------------------------------------------------------

def tree_files(root):
    git = ["git", "-c", "safe.directory=*", "-C", str(root), "ls-files", "-z"]
    try:
        listed = subprocess.run(git, capture_output=True, check=True, timeout=30).stdout
        # An empty list is a source archive unpacked inside of somebody else's checkout.
        if listed:
            return sorted(name for name in listed.decode().split("\0") if name)
    except (OSError, subprocess.SubprocessError):
        pass
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        found += [os.path.relpath(os.path.join(folder, name), root) for name in names]
    return sorted(found)


def check_tree(root, report):
    checked = 0
    for path in tree_files(root):
        full = Path(root) / path
        if full.suffix in BINARY or full.is_symlink() or not full.is_file():
            continue
        try:
            text = full.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            report.error(path, 1, "is not UTF-8 text")
            continue
        checked += 1
        check_file(path, text, report)
    return checked


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[2])
    parser.add_argument("--self-test", action="store_true", help="check the rules on small files")
    arguments = parser.parse_args()
    if arguments.self_test:
        import tidy_self_test
        return tidy_self_test.run()
    report = Report()
    checked = check_tree(arguments.root, report)
    print("\n".join(report.lines + [f"tidy: {checked} files, {report.errors} errors, "
                                    f"{len(report.lines) - report.errors} warnings"]))
    if checked == 0:
        print(f"{arguments.root}:1: error: no file to check")
    return 1 if report.errors or checked == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
