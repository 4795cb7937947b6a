// SPDX-License-Identifier: Apache-2.0
#include "client/ctl/tables.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "google/protobuf/descriptor.h"
#include "nlohmann/json.hpp"

namespace zerod::ctl {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using Json = nlohmann::ordered_json;

Json Convert(const Message& message);

// Element `i` of a repeated field, or the value of a plain one (i < 0).
Json Value(const Message& m, const FieldDescriptor* f, int i) {
  const google::protobuf::Reflection* r = m.GetReflection();
  switch (f->cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
      return i < 0 ? r->GetInt32(m, f) : r->GetRepeatedInt32(m, f, i);
    case FieldDescriptor::CPPTYPE_INT64:
      return i < 0 ? r->GetInt64(m, f) : r->GetRepeatedInt64(m, f, i);
    case FieldDescriptor::CPPTYPE_UINT32:
      return i < 0 ? r->GetUInt32(m, f) : r->GetRepeatedUInt32(m, f, i);
    case FieldDescriptor::CPPTYPE_UINT64:
      return i < 0 ? r->GetUInt64(m, f) : r->GetRepeatedUInt64(m, f, i);
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return i < 0 ? r->GetDouble(m, f) : r->GetRepeatedDouble(m, f, i);
    case FieldDescriptor::CPPTYPE_FLOAT:
      return i < 0 ? r->GetFloat(m, f) : r->GetRepeatedFloat(m, f, i);
    case FieldDescriptor::CPPTYPE_BOOL:
      return i < 0 ? r->GetBool(m, f) : r->GetRepeatedBool(m, f, i);
    case FieldDescriptor::CPPTYPE_ENUM:
      return i < 0 ? r->GetEnum(m, f)->name() : r->GetRepeatedEnum(m, f, i)->name();
    case FieldDescriptor::CPPTYPE_STRING:
      return i < 0 ? r->GetString(m, f) : r->GetRepeatedString(m, f, i);
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return Convert(i < 0 ? r->GetMessage(m, f) : r->GetRepeatedMessage(m, f, i));
  }
  return nullptr;
}

Json Convert(const Message& message) {
  Json json = Json::object();
  const google::protobuf::Descriptor* descriptor = message.GetDescriptor();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    if (!field->is_repeated()) {
      json[field->name()] = Value(message, field, -1);
      continue;
    }
    Json list = Json::array();
    const int size = message.GetReflection()->FieldSize(message, field);
    for (int j = 0; j < size; ++j) list.push_back(Value(message, field, j));
    json[field->name()] = std::move(list);
  }
  return json;
}

std::string Duration(double seconds) {
  if (seconds < 120) return absl::StrFormat("%.0f s", seconds);
  if (seconds < 7200) return absl::StrFormat("%.0f min", seconds / 60);
  return absl::StrFormat("%.1f h", seconds / 3600);
}

uint64_t MemoryOf(const v1::JobStatus& job) {
  uint64_t bytes = 0;
  for (const v1::MemoryUse& use : job.memory()) bytes += use.bytes();
  return bytes;
}

int Attached(const v1::JobStatus& job) {
  int count = 0;
  for (const v1::ClientStatus& client : job.clients()) count += client.state() == "attached";
  return count;
}

const v1::JobStatus* Find(const v1::ListJobsResponse& jobs, const std::string& id) {
  for (const v1::JobStatus& job : jobs.jobs()) {
    if (job.job() == id) return &job;
  }
  return nullptr;
}

// "-" where the counter went back: another job of the same name.
std::string Rate(uint64_t before, uint64_t now, double seconds) {
  if (seconds <= 0 || now < before) return "-";
  return absl::StrCat(Bytes(static_cast<double>(now - before) / seconds), "/s");
}

// A row of a plan: a value for each node, or where those are many the least and the most.
struct Row {
  std::string label;
  std::vector<uint64_t> bytes;
};
constexpr size_t kNodeColumnsMax = 4;

std::string Header(const char* label, size_t nodes) {
  std::string line = absl::StrFormat("%-24s", label);
  if (nodes > kNodeColumnsMax) return line + absl::StrFormat("%13s%13s", "least", "most");
  for (size_t i = 0; i < nodes; ++i) {
    absl::StrAppendFormat(&line, "%13s", absl::StrCat("node ", i));
  }
  return line;
}

std::string Cells(const Row& row) {
  std::string line = absl::StrFormat("%-24s", row.label);
  std::vector<uint64_t> shown = row.bytes;
  if (shown.size() > kNodeColumnsMax) {
    const auto [least, most] = std::minmax_element(row.bytes.begin(), row.bytes.end());
    shown = {*least, *most};
  }
  for (uint64_t bytes : shown) {
    absl::StrAppendFormat(&line, "%13s", Bytes(static_cast<double>(bytes)));
  }
  return line;
}

Row RowOf(const v1::PlanResponse& plan, std::string label,
          uint64_t (v1::MemberPlan::*bytes)() const) {
  Row row{std::move(label), {}};
  for (const v1::MemberPlan& member : plan.members()) row.bytes.push_back((member.*bytes)());
  return row;
}

std::string MemoryTable(const v1::PlanResponse& plan) {
  std::string text = Header("memory", plan.members().size()) + "\n";
  for (int i = 0; i < plan.members(0).memory_size(); ++i) {
    const v1::PlannedMemory& first = plan.members(0).memory(i);
    Row row{absl::StrFormat("  %-7s%s", first.tier(), first.kind()), {}};
    uint64_t sum = 0;
    for (const v1::MemberPlan& member : plan.members()) {
      row.bytes.push_back(member.memory(i).bytes());
      sum += row.bytes.back();
    }
    if (sum > 0) absl::StrAppend(&text, Cells(row), "\n");
  }
  absl::StrAppend(&text, Cells(RowOf(plan, "  in all", &v1::MemberPlan::memory_bytes)), "\n",
                  Cells(RowOf(plan, "  of it each rank's own", &v1::MemberPlan::rank_bytes)),
                  "\n");
  return text;
}

std::string TrafficTable(const v1::PlanResponse& plan) {
  const std::pair<const char*, uint64_t (v1::MemberPlan::*)() const> kinds[] = {
      {"  gathered", &v1::MemberPlan::bytes_gathered},
      {"  scattered by ranks", &v1::MemberPlan::bytes_scattered},
      {"  sent to other nodes", &v1::MemberPlan::bytes_sent},
      {"  received from them", &v1::MemberPlan::bytes_received},
  };
  std::string text = absl::StrFormat("%s%13s%16s\n", Header("a step", plan.members().size()),
                                     "in all", "per parameter");
  for (const auto& [label, bytes] : kinds) {
    const Row row = RowOf(plan, label, bytes);
    uint64_t sum = 0;
    for (uint64_t b : row.bytes) sum += b;
    const double parameters =
        static_cast<double>(plan.parameters()) * static_cast<double>(row.bytes.size());
    absl::StrAppendFormat(&text, "%s%13s%14.2f B\n", Cells(row), Bytes(static_cast<double>(sum)),
                          static_cast<double>(sum) / parameters);
  }
  return text;
}

}  // namespace

std::string ToJson(const Message& message) { return Convert(message).dump(2) + "\n"; }

std::string Bytes(double bytes) {
  constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  size_t unit = 0;
  while (bytes >= 1024 && unit < 5) {
    bytes /= 1024;
    ++unit;
  }
  return absl::StrFormat(unit == 0 ? "%.0f %s" : "%.1f %s", bytes, kUnits[unit]);
}

std::string StatusText(const v1::StatusResponse& s) {
  return absl::StrFormat(
      "zerod %s, process %d, up %s%s\n"
      "jobs       %d\n"
      "clients    %d\n"
      "resident   %s\n"
      "reserved   %s for jobs\n"
      "available  %s\n"
      "peers at   %s\n"
      "metrics at %s\n"
      "boot id    %s\n",
      s.version(), s.pid(), Duration(s.uptime_seconds()), s.draining() ? ", draining" : "",
      s.jobs(), s.clients(), Bytes(static_cast<double>(s.rss_bytes())),
      Bytes(static_cast<double>(s.memory_reserved_bytes())),
      Bytes(static_cast<double>(s.memory_available_bytes())), s.peer_address(),
      s.metrics_address().empty() ? "none"
                                  : absl::StrCat("http://", s.metrics_address(), "/metrics"),
      s.boot_id());
}

std::string JobsText(const v1::ListJobsResponse& jobs) {
  if (jobs.jobs().empty()) return "no jobs\n";
  std::string text;
  for (const v1::JobStatus& j : jobs.jobs()) {
    absl::StrAppendFormat(&text, "%s: %s%s%s\n", j.job(), j.state(),
                          j.reason().empty() ? "" : ", ", j.reason());
    absl::StrAppendFormat(
        &text, "  step %d (%d applied), generation %d, ZeRO stage %d, %s, %d parameters, %s\n",
        j.committed_step(), j.applied_steps(), j.generation(), j.stage(), j.dtype(),
        j.parameters(), j.gradient_plan());
    absl::StrAppendFormat(&text, "  node %d of %d, world %d, last step %.3f s\n", j.node_rank(),
                          j.members(), j.world(), j.last_step_seconds());
    absl::StrAppendFormat(&text, "  memory %s:", Bytes(static_cast<double>(MemoryOf(j))));
    for (const v1::MemoryUse& use : j.memory()) {
      if (use.bytes() == 0) continue;
      absl::StrAppendFormat(&text, " %s %s,", use.kind(), Bytes(static_cast<double>(use.bytes())));
    }
    if (text.back() == ',') text.pop_back();
    absl::StrAppendFormat(&text, "\n  gathered %s, scattered %s, sent %s, received %s\n",
                          Bytes(static_cast<double>(j.bytes_gathered())),
                          Bytes(static_cast<double>(j.bytes_scattered())),
                          Bytes(static_cast<double>(j.bytes_sent())),
                          Bytes(static_cast<double>(j.bytes_received())));
    for (const v1::ClientStatus& c : j.clients()) {
      absl::StrAppendFormat(&text, "  rank %d: %s, process %d, step %d, holds %d units\n",
                            c.rank(), c.state(), c.pid(), c.step(), c.units_held());
    }
  }
  return text;
}

std::string PlanText(const std::string& name, const v1::PlanResponse& plan) {
  return absl::StrFormat(
      "%s: %d parameters in %d units, %s\n"
      "ZeRO stage %d, %d node%s of %d rank%s, gradients %s, window %s of %s%s\n\n%s\n%s",
      name, plan.parameters(), plan.units(), plan.dtype(), plan.stage(), plan.members_size(),
      plan.members_size() == 1 ? "" : "s", plan.local_world(), plan.local_world() == 1 ? "" : "s",
      plan.gradient_plan(), Bytes(static_cast<double>(plan.window_bytes())),
      Bytes(static_cast<double>(plan.window_bytes_all())),
      plan.window_is_master() ? ", which is the master copy" : "", MemoryTable(plan),
      TrafficTable(plan));
}

std::string TopText(const v1::StatusResponse& s, const v1::ListJobsResponse& before,
                    const v1::ListJobsResponse& now, double seconds) {
  std::string text = absl::StrFormat(
      "zerod %s  up %s  jobs %d  clients %d  resident %s  reserved %s  available %s%s\n\n",
      s.version(), Duration(s.uptime_seconds()), s.jobs(), s.clients(),
      Bytes(static_cast<double>(s.rss_bytes())),
      Bytes(static_cast<double>(s.memory_reserved_bytes())),
      Bytes(static_cast<double>(s.memory_available_bytes())), s.draining() ? "  DRAINING" : "");
  absl::StrAppendFormat(&text, "%-24s %-8s %10s %9s %8s %11s %13s %13s %13s\n", "JOB", "STATE",
                        "STEP", "S/STEP", "CLIENTS", "MEMORY", "GATHER", "SCATTER", "SENT");
  for (const v1::JobStatus& j : now.jobs()) {
    const v1::JobStatus* const then = Find(before, j.job());
    const double span = then == nullptr ? 0 : seconds;
    const v1::JobStatus& from = then == nullptr ? j : *then;
    absl::StrAppendFormat(&text, "%-24.24s %-8s %10d %9.3f %4d/%-3d %11s %13s %13s %13s\n",
                          j.job(), j.state(), j.committed_step(), j.last_step_seconds(),
                          Attached(j), j.clients_size(), Bytes(static_cast<double>(MemoryOf(j))),
                          Rate(from.bytes_gathered(), j.bytes_gathered(), span),
                          Rate(from.bytes_scattered(), j.bytes_scattered(), span),
                          Rate(from.bytes_sent(), j.bytes_sent(), span));
    if (!j.reason().empty()) absl::StrAppend(&text, "  ", j.reason(), "\n");
  }
  return text;
}

}  // namespace zerod::ctl
