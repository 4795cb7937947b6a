// SPDX-License-Identifier: Apache-2.0
//
// The extension module zerod._zerod; its interface is written down in zerod/_zerod.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/config_parse.h"
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
  options.on_wait = LogWarning;
  auto info = [&] {
    nb::gil_scoped_release release;
    return client::EnsureDaemon(options);
  }();
  if (PyErr_Occurred() != nullptr) throw nb::python_error();
  return Take(std::move(info));
}

// The daemon's own parser. With hidden sizes or values (dotted path -> JSON text) "auto" is
// resolved as far as they and its rules go.
std::string ParseConfig(const std::string& json, uint32_t world, bool deepspeed_file,
                        std::optional<std::vector<uint64_t>> hidden_sizes,
                        std::optional<std::map<std::string, std::string>> values) {
  ParseOptions options;
  options.world = world;
  options.unknown_top_keys_are_warnings = deepspeed_file;
  if (hidden_sizes.has_value() || values.has_value()) {
    AutoValues& given = options.auto_values.emplace();
    if (hidden_sizes.has_value()) given.hidden_sizes = *std::move(hidden_sizes);
    if (values.has_value()) given.values = *std::move(values);
  }
  const absl::StatusOr<ParsedConfig> parsed = zerod::ParseConfig(json, options);
  if (!parsed.ok()) throw nb::value_error(std::string(parsed.status().message()).c_str());
  return DescribeConfigAsJson(*parsed);
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
  m.def("parse_config", &zerod::python::ParseConfig, "json"_a, "world"_a, nb::kw_only(),
        "deepspeed_file"_a = false, "hidden_sizes"_a = nb::none(), "values"_a = nb::none());
  m.def("embedded_address", &zerod::client::EmbeddedAddress, "job"_a, "node_rank"_a);
  m.def("ensure_daemon", &EnsureDaemon, nb::kw_only(), "address"_a = "", "embedded"_a = true,
        "job"_a = "", "node_rank"_a = 0, "local_rank"_a = 0, "attach_timeout_seconds"_a = 60.0);
  DefineClient(m);
}
