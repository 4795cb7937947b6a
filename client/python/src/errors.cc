// SPDX-License-Identifier: Apache-2.0
#include "client/python/src/errors.h"

#include <array>
#include <string>

namespace nb = nanobind;

namespace zerod::python {
namespace {

struct ErrorClass {
  absl::StatusCode code;
  const char* name;
  PyObject* type = nullptr;  // lives as long as the interpreter
};
ErrorClass g_classes[] = {
    {absl::StatusCode::kInvalidArgument, "InvalidArgument"},
    {absl::StatusCode::kAlreadyExists, "AlreadyExists"},
    {absl::StatusCode::kFailedPrecondition, "FailedPrecondition"},
    {absl::StatusCode::kResourceExhausted, "ResourceExhausted"},
    {absl::StatusCode::kUnavailable, "Unavailable"},
    {absl::StatusCode::kAborted, "Aborted"},
    {absl::StatusCode::kDeadlineExceeded, "DeadlineExceeded"},
    {absl::StatusCode::kInternal, "Internal"},
    {absl::StatusCode::kPermissionDenied, "PermissionDenied"},
};
PyObject* g_base = nullptr;

PyObject* NewClass(nb::module_& m, const char* name, PyObject* base, const std::string& code) {
  nb::dict attributes;
  attributes["code"] = nb::str(code.c_str());
  const std::string full_name = std::string("zerod._zerod.") + name;
  PyObject* type = PyErr_NewException(full_name.c_str(), base, attributes.ptr());
  if (type == nullptr) throw nb::python_error();
  m.attr(name) = nb::handle(type);
  return type;
}

}  // namespace

void DefineErrors(nb::module_& m) {
  g_base = NewClass(m, "ZerodError", PyExc_RuntimeError, "UNKNOWN");
  for (ErrorClass& c : g_classes) {
    c.type = NewClass(m, c.name, g_base, absl::StatusCodeToString(c.code));
  }
}

void Raise(const absl::Status& status) {
  if (PyErr_Occurred() != nullptr) throw nb::python_error();
  PyObject* type = g_base;
  for (const ErrorClass& c : g_classes) {
    if (c.code == status.code()) type = c.type;
  }
  const std::string text(status.message().data(), status.message().size());
  nb::object error = nb::handle(type)(nb::str(text.c_str(), text.size()));
  if (type == g_base) error.attr("code") = absl::StatusCodeToString(status.code()).c_str();
  PyErr_SetObject(type, error.ptr());
  throw nb::python_error();
}

}  // namespace zerod::python
