// SPDX-License-Identifier: Apache-2.0
//
// zerod._zerod.Client: the client library with the GIL let go in waits.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

namespace zerod::python {

void DefineClient(nanobind::module_& m);

// True when a signal handler of Python raised (Ctrl-C): the error is then set in this thread.
// Takes the GIL. For AttachOptions::interrupt.
bool PendingSignal();
// A warning in Python's log. Takes the GIL. For AttachOptions::on_wait.
void LogWarning(const std::string& text);

}  // namespace zerod::python
