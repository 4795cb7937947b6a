// SPDX-License-Identifier: Apache-2.0
//
// The sequencer's part of what every rank calls in the same order: all_reduce, barrier, restore.
#include <cmath>
#include <iterator>
#include <map>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "daemon/core/sequencer.h"

namespace zerod::core {
namespace {

// Why the ranks' calls of one ordinal cannot be answered; empty where they can.
std::string Differ(Rank first_rank, const ScalarValues& first, Rank rank,
                   const ScalarValues& values) {
  if (values.restore.has_value() && first.restore.has_value()) {
    if (*values.restore == *first.restore) return "";
    return absl::StrCat("the ranks ", first_rank, " and ", rank, " restore different steps of the "
                        "parameters or another loss scale: give every rank the same, of the same "
                        "checkpoint");
  }
  if (values.restore.has_value() || first.restore.has_value()) {
    const bool earlier = first.restore.has_value();
    return absl::StrCat("rank ", earlier ? first_rank : rank, " calls restore where rank ",
                        earlier ? rank : first_rank, " calls all_reduce or barrier: all ranks must "
                        "make the same calls in the same order");
  }
  if (values.op == first.op && values.values.size() == first.values.size()) return "";
  return absl::StrCat("rank ", rank, " calls all_reduce or barrier with ", values.values.size(),
                      " values where rank ", first_rank, " has ", first.values.size(),
                      " or another operation: all ranks must make the same calls in the same "
                      "order");
}

double Combine(ScalarOp op, double a, double b) {
  switch (op) {
    case ScalarOp::kSum:
    case ScalarOp::kMean: return a + b;
    case ScalarOp::kMin: return std::isnan(a) || a < b ? a : b;
    case ScalarOp::kMax: return std::isnan(a) || a > b ? a : b;
  }
  return a;
}

}  // namespace

absl::Status Sequencer::OnScalar(MemberIndex from, const ScalarReady& s, std::vector<Entry>* out) {
  if (s.ordinal <= scalars_done_ || s.ranks.size() != s.values.size() ||
      !members_[from].scalars.emplace(s.ordinal, s).second) {
    return BadMessage(from, absl::StrCat("SCALAR ", s.ordinal));
  }
  for (const MemberState& m : members_) {
    if (!m.scalars.count(scalars_done_ + 1)) return absl::OkStatus();
  }
  ++scalars_done_;
  OptimizerProgress restore = std::move(members_[0].scalars.at(scalars_done_).restore);
  std::map<Rank, ScalarValues> by_rank;
  for (MemberState& m : members_) {
    auto node = m.scalars.extract(scalars_done_);
    for (size_t i = 0; i < node.mapped().ranks.size(); ++i) {
      by_rank[node.mapped().ranks[i]] = node.mapped().values[i];
    }
  }
  if (by_rank.empty()) return BadMessage(from, "a SCALAR of no rank");
  Entry& e = Add(EntryKind::kScalar, out);
  e.ordinal = scalars_done_;
  Reduce(by_rank, &e);
  if (!e.scalar.restore.has_value()) return absl::OkStatus();
  e.scalar = ScalarValues{};
  if (!e.reason.empty()) return absl::OkStatus();
  e.kind = EntryKind::kRestore;
  e.restore = std::move(restore);
  if (loss_scaler_.has_value() && e.restore.loss_scaler.has_value()) {
    loss_scaler_->Restore(*e.restore.loss_scaler);
  }
  return absl::OkStatus();
}

void Sequencer::Reduce(const std::map<Rank, ScalarValues>& by_rank, Entry* e) const {
  const auto& [first_rank, first] = *by_rank.begin();
  e->scalar = first;
  for (auto it = std::next(by_rank.begin()); it != by_rank.end(); ++it) {
    const auto& [rank, values] = *it;
    e->reason = Differ(first_rank, first, rank, values);
    if (!e->reason.empty()) return;
    for (size_t i = 0; i < values.values.size(); ++i) {
      e->scalar.values[i] = Combine(e->scalar.op, e->scalar.values[i], values.values[i]);
    }
  }
  if (e->scalar.op == ScalarOp::kMean) {
    for (double& v : e->scalar.values) v /= static_cast<double>(by_rank.size());
  }
}

}  // namespace zerod::core
