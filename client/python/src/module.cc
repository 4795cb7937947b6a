// SPDX-License-Identifier: Apache-2.0
//
// The extension module zerod._zerod; its interface is written down in zerod/_zerod.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <string>
#include <vector>

#include "client/cpp/include/zerod/client.h"
#include "client/python/src/errors.h"
#include "client/python/src/py_client.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace zerod::python {
namespace {

client::DaemonInfo EnsureDaemon(std::string address, bool embedded, std::string job,
                                uint32_t node_rank, uint32_t local_rank,
                                double attach_timeout_seconds) {
  client::AttachOptions options;
  options.address = std::move(address);
  options.embedded = embedded;
  options.job = std::move(job);
  options.node_rank = node_rank;
  options.local_rank = local_rank;
  options.attach_timeout_seconds = attach_timeout_seconds;
  options.interrupt = PendingSignal;
  auto info = [&] {
    nb::gil_scoped_release release;
    return client::EnsureDaemon(options);
  }();
  if (PyErr_Occurred() != nullptr) throw nb::python_error();
  return Take(std::move(info));
}

std::string ParseConfig(const std::string& json, uint32_t world) {
  std::vector<std::string> warnings;
  absl::StatusOr<std::string> config = client::CheckConfig(json, world, &warnings);
  if (!config.ok()) throw nb::value_error(std::string(config.status().message()).c_str());
  for (const std::string& warning : warnings) {
    // Below zero where the script makes errors of warnings.
    if (PyErr_WarnEx(PyExc_UserWarning, warning.c_str(), 2) < 0) throw nb::python_error();
  }
  return *std::move(config);
}

}  // namespace
}  // namespace zerod::python

NB_MODULE(_zerod, m) {
  // Engines live until the interpreter ends, and a traceback may keep them beyond: not a leak.
  nb::set_leak_warnings(false);
  using namespace zerod::python;
  m.attr("__version__") = ZEROD_VERSION;
  DefineErrors(m);
  nb::class_<zerod::client::DaemonInfo>(m, "DaemonInfo")
      .def_ro("address", &zerod::client::DaemonInfo::address)
      .def_ro("peer_address", &zerod::client::DaemonInfo::peer_address)
      .def_ro("boot_id", &zerod::client::DaemonInfo::boot_id);
  m.def("version", [] { return std::string(ZEROD_VERSION); });
  m.def("trim_heap", [] {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
  });
  m.def("parse_config", &ParseConfig, "json"_a, "world"_a);
  m.def("embedded_address", &zerod::client::EmbeddedAddress, "job"_a, "node_rank"_a);
  m.def("ensure_daemon", &EnsureDaemon, nb::kw_only(), "address"_a = "", "embedded"_a = true,
        "job"_a = "", "node_rank"_a = 0, "local_rank"_a = 0, "attach_timeout_seconds"_a = 60.0);
  DefineClient(m);
}
