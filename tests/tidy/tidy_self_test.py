# SPDX-License-Identifier: Apache-2.0
"""What tidy.py must find, and what it must let pass: `tidy.py --self-test`."""

import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import tidy  # noqa: E402

CPP_HEAD = "// SPDX-License-Identifier: Apache-2.0\n"
PY_HEAD = "# SPDX-License-Identifier: Apache-2.0\n"


def check(path, text):
    report = tidy.Report()
    tidy.check_file(path, text, report)
    return report.lines


def cpp(path, body):
    return check(path, CPP_HEAD + body)


def body_of(lines):
    return "".join(f"  Call({i});\n" for i in range(lines))


class Lines(unittest.TestCase):
    def test_columns(self):
        self.assertEqual(cpp("base/a.cc", "//" + "x" * 98 + "\n"), [])
        self.assertEqual(cpp("base/a.cc", "//" + "x" * 99 + "\n"),
                         ["base/a.cc:2: error: 101 columns; at most 100"])
        self.assertEqual(cpp("base/a.cc", "//" + "é" * 98 + "\n"), [])
        self.assertEqual(check("docs/a.md", "x" * 300 + "\n"), [])

    def test_trailing_space(self):
        for end in (" ", "\t", "\r"):
            self.assertEqual(cpp("base/a.cc", f"int x;{end}\n"),
                             ["base/a.cc:2: error: space at the end of the line"])

    def test_file_length(self):
        self.assertEqual(cpp("base/a.h", "int x;\n" * 599), [])
        self.assertIn("base/a.h:601: warning", cpp("base/a.h", "int x;\n" * 600)[0])
        self.assertIn("base/a.h:1001: error", cpp("base/a.h", "int x;\n" * 1000)[0])

    def test_licence(self):
        missing = ["a.cc:1: error: no SPDX-License-Identifier in the first lines"]
        self.assertEqual(check("a.cc", "int x;\n"), missing)
        self.assertEqual(len(check("scripts/setup", "#!/bin/sh\ntrue\n")), 1)
        self.assertEqual(len(check("x/CMakeLists.txt", "add_library(x)\n")), 1)
        self.assertEqual(check("client/python/zerod/__init__.py", ""), [])
        self.assertEqual(check("scripts/setup", "#!/bin/sh\n" + PY_HEAD), [])
        self.assertEqual(check("LICENSE", "text\n"), [])

    def test_allow(self):
        self.assertEqual(cpp("base/a.cc", "int* x = new int;  // tidy: allow (why)\n"), [])
        self.assertEqual(cpp("base/a.cc", "// why. tidy: allow\nint* x = new int;\n"), [])
        self.assertEqual(len(cpp("base/a.cc", "// tidy: allow\n\nint* x = new int;\n")), 1)


class Functions(unittest.TestCase):
    def lengths(self, body):
        return list(tidy.cpp_functions(tidy.cpp_code(body)))

    def test_cpp(self):
        for head in ("int F(int a = 3)", "Foo::Foo(int a) : a_(a), b_{1}, c_{}",
                     "bool operator==(const A& a, const A& b)", "TEST(Suite, Name)",
                     "template <class T = int>\nauto F(T t) -> decltype(t.x())",
                     "void operator()(int a) const noexcept", "struct A F()",
                     "static std::function<void()> F(const std::string& s = \"{\")"):
            function = head + " {\n" + body_of(5) + "}\n"
            lines = function.count("\n")
            self.assertEqual(self.lengths(function), [(1, lines)], head)
            nested = "namespace a {\nclass B final : public C {\n public:\n" + function + "};\n}\n"
            self.assertEqual(self.lengths(nested), [(4, lines)], head)

    def test_cpp_not_functions(self):
        for text in ("struct alignas(64) A {\n  int x;\n};\n", "enum class E { kA, kB };\n",
                     "const T kTable[] = {\n  {F(1), 2},\n};\n", "namespace {\n}\n",
                     "std::vector<int> x{\n1,\n};\n", "#define M(x) \\\n  if (x) { \\\n  }\n"):
            self.assertEqual(self.lengths(text), [], text)

    def test_cpp_quotes(self):
        text = "void F() {\n  x = '{'; y = \"}\"; // }\n  z = R\"(}\n)\"; n = 1'000'000;\n}\n"
        self.assertEqual(self.lengths(text), [(1, 5)])

    def test_lambdas_count_with_their_function(self):
        self.assertEqual(self.lengths("void F() {\n  G([](int a) {\n    H(a);\n  });\n}\n"),
                         [(1, 5)])

    def test_limits(self):
        def found(lines):
            return cpp("base/a.cc", "void F() {\n" + body_of(lines - 2) + "}\n")
        self.assertEqual(found(70), [])
        self.assertEqual(found(71),
                         ["base/a.cc:2: warning: a function of 71 lines; better below 70"])
        self.assertIn("warning", found(120)[0])
        self.assertEqual(found(121),
                         ["base/a.cc:2: error: a function of 121 lines; at most 120"])

    def test_python(self):
        text = PY_HEAD + "class A:\n  def f(self):\n" + "    g()\n" * 120
        self.assertEqual(check("a.py", text),
                         ["a.py:3: error: a function of 121 lines; at most 120"])
        self.assertIn("not valid Python", check("a.py", PY_HEAD + "def f(:\n")[0])


class Calls(unittest.TestCase):
    def test_found(self):
        for path, line in (("base/a.cc", 'printf("x");'), ("base/a.cc", 'std::printf("x");'),
                           ("daemon/server/a.cc", "std::cout << 1;"), ("base/a.h", 'puts("x");'),
                           ("tests/a.cc", "std::this_thread::sleep_for(x);"),
                           ("tests/a.cc", "usleep(10);"), ("tests/a.cc", "::sleep(1);"),
                           ("base/a.cc", "auto* x = new Foo(1);"), ("base/a.cc", "new (p) Foo;"),
                           ("base/a.cc", "delete x;"), ("base/a.cc", "delete[] x;")):
            found = cpp(path, f"void F() {{\n  {line}\n}}\n")
            self.assertEqual(len(found), 1, line)
            self.assertTrue(found[0].startswith(f"{path}:3: error: "), found)
        self.assertEqual(len(check("tests/a.py", PY_HEAD + "time.sleep(1)\n")), 1)
        self.assertEqual(len(check("tests/a.py", PY_HEAD + "sleep(1)\n")), 1)

    def test_let_pass(self):
        for path, line in (("client/ctl/a.cc", 'std::cout << "x";'), ("tests/a.cc", 'printf("");'),
                           ("base/a.cc", 'std::snprintf(b, n, "");'), ("base/a.cc", "log.puts(x);"),
                           ("daemon/engine/a.cc", "std::this_thread::sleep_for(x);"),
                           ("base/a.cc", "A(const A&) = delete;"), ("base/a.cc", "int new_size;"),
                           ("base/a.cc", "// a new one; delete it"),
                           ("base/a.cc", "#include <new>"),
                           ("base/a.cc", "void operator delete(void* p);"),
                           ("base/a.cc", 'x = "new Foo; printf()";')):
            self.assertEqual(cpp(path, line + "\n"), [], line)
        self.assertEqual(check("examples/a.py", PY_HEAD + "time.sleep(1)\n"), [])
        self.assertEqual(check("tests/a.py", PY_HEAD + "x = 'time.sleep(1)'  # sleep(1)\n"), [])


class Includes(unittest.TestCase):
    def found(self, path, include):
        return cpp(path, f"#include {include}\n")

    def test_refused(self):
        for path, include in (
                ("base/a.h", '"proto/shm/format.h"'), ("base/a.h", '"daemon/core/job.h"'),
                ("proto/shm/a.h", '"base/check.h"'), ("kernels/cpu/a.cc", '"storage/arena/a.h"'),
                ("storage/arena/a.cc", '"kernels/cpu/kernels.h"'),
                ("daemon/core/a.cc", '"daemon/engine/a.h"'), ("daemon/core/a.cc", "<sys/mman.h>"),
                ("daemon/core/a.cc", '"proto/zerod/v1/jobs.pb.h"'), ("daemon/core/a.cc", "<mutex>"),
                ("daemon/core/a.cc", '"zerod/v1/jobs.pb.h"'), ("daemon/core/a.cc", "<unistd.h>"),
                ("daemon/core/a.cc", '"spdlog/spdlog.h"'),
                ("daemon/fabric/a.cc", '"daemon/core/job.h"'),
                ("daemon/metrics/a.cc", '"daemon/engine/a.h"'),
                ("daemon/engine/a.cc", '"daemon/server/a.h"'),
                ("client/cpp/a.cc", '"daemon/core/layout.h"'),
                ("daemon/server/a.cc", '"zerod/client.h"'), ("base/a.cc", '"tests/sim/a.h"'),
                ("daemon/core/a.cc", '"../engine/a.h"')):
            found = self.found(path, include)
            self.assertEqual(len(found), 1, (path, include))
            self.assertTrue(found[0].startswith(f"{path}:2: error: "), found)

    def test_let_pass(self):
        for path, include in (
                ("base/a.cc", '"base/check.h"'), ("base/a.cc", "<xxhash.h>"),
                ("proto/shm/a.cc", '"proto/shm/format.h"'), ("daemon/core/a.cc", "<vector>"),
                ("daemon/core/a.cc", '"absl/status/status.h"'),
                ("daemon/core/a.cc", '"daemon/core/job.h"'), ("daemon/core/a.cc", '"base/hash.h"'),
                ("daemon/engine/a.cc", '"storage/arena/arena.h"'), ("base/a.cc", "<mutex>"),
                ("daemon/server/a.cc", '"daemon/engine/a.h"'),
                ("daemon/server/a.cc", '"zerod/v1/jobs.pb.h"'),
                ("daemon/main.cc", '"daemon/server/server.h"'),
                ("client/cpp/a.cc", '"zerod/client.h"'), ("tests/sim/a.cc", '"daemon/core/job.h"')):
            self.assertEqual(self.found(path, include), [], (path, include))
        self.assertEqual(cpp("base/a.h", '// #include "daemon/core/job.h"\n'), [])


class Tree(unittest.TestCase):
    def write(self, root, path, text):
        full = Path(root) / path
        full.parent.mkdir(parents=True, exist_ok=True)
        full.write_text(text)

    def run_tidy(self, root):
        script = Path(tidy.__file__)
        return subprocess.run([sys.executable, str(script), "--root", str(root)], text=True,
                              capture_output=True, timeout=60, check=False)

    def test_exit_status_and_what_is_read(self):
        with tempfile.TemporaryDirectory() as root:
            self.assertEqual(self.run_tidy(root).returncode, 1)  # nothing to check is no success
            self.write(root, "base/a.cc", CPP_HEAD)
            self.write(root, "build/b.cc", "generated \n")
            done = self.run_tidy(root)
            self.assertEqual(done.returncode, 0, done.stdout)
            self.write(root, "base/a.cc", CPP_HEAD + "int x; \n")
            done = self.run_tidy(root)
            self.assertEqual(done.returncode, 1)
            self.assertIn("base/a.cc:2: error: space at the end of the line", done.stdout)
            self.write(root, "base/a.cc", CPP_HEAD + "int x;\n" * 700)
            done = self.run_tidy(root)
            self.assertEqual(done.returncode, 0, done.stdout)
            self.assertIn("warning", done.stdout)

    def test_a_checkout_is_read_by_what_it_tracks(self):
        with tempfile.TemporaryDirectory() as root:
            self.write(root, "base/a.cc", CPP_HEAD)
            self.write(root, "base/untracked.cc", "int x; \n")
            for command in (["init", "-q"], ["add", "base/a.cc"]):
                subprocess.run(["git", "-C", root] + command, check=True, timeout=30)
            self.assertEqual(self.run_tidy(root).returncode, 0)


def run():
    suite = unittest.defaultTestLoader.loadTestsFromModule(sys.modules[__name__])
    return 0 if unittest.TextTestRunner(verbosity=1).run(suite).wasSuccessful() else 1
