// SPDX-License-Identifier: Apache-2.0
#include "base/config.h"

#include "base/config_parse.h"
#include "base/config_state.h"
#include "base/status.h"

namespace zerod {

absl::StatusOr<Config> Config::Parse(absl::string_view json, uint32_t world) {
  ParseOptions options;
  options.world = world;
  ASSIGN_OR_RETURN(ParsedConfig parsed, ParseConfig(json, options));
  return std::move(parsed.config);
}

std::string Config::ToJson() const {
  Json document = Json::object();
  Config copy = *this;  // a slot is of a configuration that may be written
  for (const ConfigKey& key : ConfigKeys()) {
    if (key.slot != nullptr && IsOfType(key, copy)) {
      document[Pointer(key.path)] = WriteKey(key, copy);
    }
  }
  if (optimizer.type.empty()) document["optimizer"] = nullptr;
  if (scheduler.type.empty()) document["scheduler"] = nullptr;
  if (Contains(TorchSchedulers(), scheduler.type)) {
    Json& params = document["scheduler"]["params"] = Json::object();
    for (const auto& [name, value] : scheduler.torch_params) params[name] = Json::parse(value);
  }
  return document.dump(-1, ' ', /*ensure_ascii=*/false, Json::error_handler_t::replace);
}

}  // namespace zerod
