#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Mistakes that the simulation must catch: each is one edit of a source of daemon/core.

mutants.py --list                 name and source of each, for CMake
mutants.py --write NAME OUT       the source with that mistake in it
mutants.py --run DIR              runs DIR/sim_mutant_NAME of each; fails where one is not caught
"""
import argparse
import os
import pathlib
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

CORE = pathlib.Path(__file__).resolve().parents[2] / "daemon" / "core"

# name, source, exact text, what stands there instead
MUTANTS = [
    ("no_generation_check", "sequencer.cc",
     "if (report.generation != generation_) continue;", ""),
    ("apply_twice", "job_log.cc",
     "      Emit(StartApply{i, plan});\n",
     "      Emit(StartApply{i, plan});\n      if (e.step == 2) Emit(StartApply{i, plan});\n"),
    ("drop_scatter", "job_gradients.cc",
     "  if (last) {\n    ++s.marks[unit];",
     "  if (last && !(slot == 1 && unit == 1)) {\n    ++s.marks[unit];"),
    ("gather_from_old_copy", "job_clients.cc",
     "  if (window_.Valid(unit, committed_)) {\n    Answer",
     "  if (window_.Valid(unit, committed_) ||\n"
     "      (committed_ > 0 && window_.Valid(unit, committed_ - 1)) ||\n"
     "      (window_.version(unit) + 1 == committed_ &&\n"
     "       window_.copy(unit) == Window::Copy::kAbsent)) {\n    Answer"),
    ("keep_stale_copy", "job_log.cc",
     "      window_.Retract(i, /*refill=*/window_.resident(i));\n      u.applying = true;",
     "      if (window_.Valid(i, e.step - 1) && !window_.resident(i)) {\n"
     "        window_.Publish(i, e.step);\n"
     "      } else {\n        window_.Retract(i, window_.resident(i));\n      }\n"
     "      u.applying = true;"),
    ("evict_held_copy", "window.cc",
     "  if (!port_->TryUnmap(u)) return false;\n",
     "  if (!port_->TryUnmap(u)) port_->Retract(u), port_->TryUnmap(u);\n"),
    ("commit_before_all_norms", "sequencer.cc",
     "    if (!m.norm.has_value()) return;\n    nonfinite",
     "    if (!m.norm.has_value()) continue;\n    nonfinite"),
    ("forget_late_round", "job_gradients.cc",
     "  for (;;) {\n    const uint32_t round = u.reported_round + 1;",
     "  for (; u.reported_round < 1;) {\n    const uint32_t round = u.reported_round + 1;"),
    ("put_during_gather", "job_log.cc",
     "return connected_ && u.exchanges == 0 && !u.applying && u.applied == committed_;",
     "return connected_;"),
    ("lose_publish", "job_log.cc",
     "if (receiving_.erase(e.seq) != 0) PublishCopy(e.unit, e.step);",
     "if (receiving_.erase(e.seq) != 0 && e.seq % 16 != 15) PublishCopy(e.unit, e.step);"),
    ("node_sum_in_arrival_order", "job_gradients.cc",
     "    if (!Passed(i, unit, s)) return false;\n",
     "    if (!Passed(i, unit, s) && spec_.node_sum) continue;\n"),
    ("scale_stays_after_overflow", "sequencer.cc",
     "loss_scaler_->Update(decision->kind == Decision::Kind::kSkip)",
     "loss_scaler_->Update(false)"),
    ("forget_the_scale", "job_log.cc",
     "  step_result_ = {d.grad_norm, d.kind == Decision::Kind::kSkip, d.next_loss_scale};\n",
     "  const double scale = step_result_.next_loss_scale;\n"
     "  step_result_ = {d.grad_norm, d.kind == Decision::Kind::kSkip,\n"
     "                  d.kind == Decision::Kind::kApply ? d.next_loss_scale : scale};\n"),
    ("norm_without_reduces", "job_log.cc",
     "    case EntryKind::kNorm:\n      return running_.empty();",
     "    case EntryKind::kNorm:\n      return true;"),
    ("commit_while_sending", "job_log.cc",
     "      // What is being sent must not be rewritten under the sender.\n"
     "      return running_.empty() && !norm_running_;",
     "      return !norm_running_;"),
    ("gather_before_apply", "job_log.cc",
     "return connected_ && !u.writing && !u.applying && u.applied >= e.step;",
     "return connected_ && !u.writing;"),
    ("norms_before_all_measured", "sequencer.cc",
     "  for (const MemberState& other : members_) {\n"
     "    if (!other.squares.has_value()) return absl",
     "  for (MemberState& other : members_) {\n"
     "    if (!other.squares.has_value()) other.squares.emplace(size_t{1} << 16);\n"
     "    if (!other.squares.has_value()) return absl"),
    ("entries_amid_measuring", "sequencer.cc",
     "    held_.emplace_back(from, item);\n    return absl::OkStatus();\n", ""),
    ("forget_what_was_held", "sequencer.cc",
     "    if (generation_ != generation) break;  // stale",
     "    if (generation_ == generation) break;"),
    ("squares_of_another_owner", "sequencer.cc",
     "(*members_[m].squares)[next[m]++];", "(*members_[m].squares)[0];"),
    ("step_answered_early", "job_log.cc",
     "  if (!finishing_step_ || applying_ != 0) return;", "  if (!finishing_step_) return;"),
    ("generation_amid_apply", "job_log.cc",
     "running_.empty() && !norm_running_ && applying_ == 0 && !finishing_step_ &&",
     "running_.empty() && !norm_running_ &&"),
    ("micro_steps_never_end", "job_gradients.cc",
     "         std::make_tuple(slot.scalars, slot.micro_steps, slot.indices[unit][s.part]) >=\n"
     "             std::make_tuple(s.scalars, s.micro_step, index);",
     "         slot.scalars >= s.scalars && slot.micro_steps >= s.micro_step &&\n"
     "         slot.indices[unit][s.part] >= index;"),
    ("scalars_do_not_pass_on", "job_clients.cc",
     "  if (spec_.node_sum) PassOn(&slots_[waiter.slot]);\n", ""),
    ("scalars_leave_the_order", "job_gradients.cc",
     "s.marks[unit] + 1u, s.scalars, s.micro_steps,", "s.marks[unit] + 1u, 0, s.micro_steps,"),
    ("micro_steps_in_arrival_order", "job_gradients.cc",
     "s.scalars, s.micro_steps,", "s.scalars, 0,"),
    ("no_room_is_made", "job_gradients.cc",
     "  slots_[slot].wants_room = true;\n", "  slots_[slot].wants_room = false;\n"),
    ("set_aside_without_end", "job_gradients.cc",
     "    if (aside_bytes_ + oldest->bytes > AsideMax(slots_[i])) continue;\n", ""),
    ("little_is_set_aside", "job_gradients.cc",
     "(slots_.size() - left) * aside_of_one_", "(slots_.size() - left) * aside_of_one_ / 4"),
    ("add_what_is_not_aside_yet", "job_gradients.cc",
     "!s.moving && Ready(unit, s)", "Ready(unit, s)"),
    ("parts_overtake_their_own", "job_gradients.cc",
     "Ready(unit, s) && FirstOfItsPart(unit, s);", "Ready(unit, s);"),
    ("parts_share_an_order", "job_gradients.cc",
     "part, s.indices[unit][part]++,", "part, s.indices[unit][0]++,"),
    ("gradient_read_before_it_is_reduced", "job_clients.cc",
     "    if (u.reduced_round < slots_[r.waiter.slot].marks[unit]) {\n", "    if (false) {\n"),
    ("generation_amid_set_aside", "job_log.cc",
     "             setting_aside_ == 0 &&\n", ""),
    ("accumulate_over", "job_gradients.cc",
     "/*first=*/!u.accumulated,", "/*first=*/s.index == 0,"),
    ("untouched_applied", "job_log.cc",
     "    if (!e.decision.touched[p]) continue;\n    ++steps[p];",
     "    ++steps[p];\n    if (!e.decision.touched[p]) continue;"),
    ("reclaim_too_early", "job_gradients.cc",
     "if (u.reducing == 0 && u.reduced_round >= slots_[w.slot].marks[unit]) {",
     "if (u.reduced_round + 1u >= slots_[w.slot].marks[unit]) {"),
    ("barrier_before_put", "job_log.cc",
     "return r.second.kind == EntryKind::kPut; });",
     "return r.second.kind == EntryKind::kPut && r.first == 0; });"),
    ("no_retry_for_room", "job_log.cc",
     "    RetryRoom();\n    Forecast();\n    if (seq", "    Forecast();\n    if (seq"),
    ("forget_who_else_wants", "want_queue.cc",
     "  if (waiting != forecast_.end()) {\n    waiting->wants |= bit;",
     "  if (waiting != forecast_.end()) {"),
    ("begin_no_further_gathers", "sequencer.cc",
     "  wants_.Ended(unit);\n  AppendGathers(out);", "  wants_.Ended(unit);"),
    ("refused_step_counts", "sequencer.cc",
     "  if (kind == Decision::Kind::kRefuse) return AfterCommit(out);\n  ++committed_;",
     "  ++committed_;\n  if (kind == Decision::Kind::kRefuse) return AfterCommit(out);"),
    ("commit_without_gradients", "sequencer.cc",
     "    if (!d.reason.empty()) {\n", "    if (d.reason.size() == 1) {\n"),
    ("restore_on_member_0_alone", "job_log.cc",
     "  progress_.parameter_steps = e.restore.parameter_steps;",
     "  if (spec_.self == 0) progress_.parameter_steps = e.restore.parameter_steps;"),
    ("restore_leaves_the_scaler", "sequencer_scalars.cc",
     "    loss_scaler_->Restore(*e.restore.loss_scaler);\n", ""),
    ("restore_tells_no_scale", "job_log.cc",
     "    step_result_.next_loss_scale = e.restore.loss_scaler->scale;\n", ""),
    ("restore_what_differs", "sequencer_scalars.cc",
     "if (*values.restore == *first.restore) return \"\";", "return \"\";"),
    ("state_into_the_weights", "job_log.cc",
     "e.begin, e.count, e.state_kind});\n}\n\nvoid Job::StartFirst",
     "e.begin, e.count});\n}\n\nvoid Job::StartFirst"),
    ("detach_of_what_never_ran", "job_clients.cc",
     "const bool left = state_ != JobState::kForming;", "const bool left = true;"),
    ("forget_member_down", "job.cc",
     "state_ == JobState::kEnded || member == spec_.self) return;",
     "state_ == JobState::kEnded || member <= spec_.members) return;"),
]


def mutated(source: str, old: str, new: str) -> str:
    text = (CORE / source).read_text()
    if text.count(old) != 1:
        sys.exit(f"mutants.py: {source} has this text {text.count(old)} times, not once; "
                 f"bring the mutation up to date:\n{old}")
    return text.replace(old, new)


def catch(name: str, directory: pathlib.Path, schedules_max: int) -> tuple[str, bool, str]:
    """Runs the mutant on more and more schedules until it breaks an invariant."""
    first, schedules, start = 1, 50, time.monotonic()
    while first <= schedules_max:
        done = subprocess.run(
            [directory / f"sim_mutant_{name}", "--first", str(first), "--schedules",
             str(schedules)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            timeout=300, check=False)
        if done.returncode != 0:
            line = next((x for x in done.stderr.splitlines() if x.startswith("VIOLATION")), None)
            if done.returncode < 0:
                # Without the assertions of a debug build a mistake may end in a fault: seen too.
                return name, True, f"it dies of signal {-done.returncode}"
            if line is None:
                return name, False, f"ended with {done.returncode} and no verdict: {done.stderr}"
            return name, True, f"{time.monotonic() - start:.1f} s, {line[:120]}"
        first += schedules
        schedules *= 2
    return name, False, f"not caught in {first - 1} schedules"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--write", nargs=2, metavar=("NAME", "OUT"))
    parser.add_argument("--run", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--schedules-max", type=int, default=12000)
    args = parser.parse_args()
    if args.list:
        print(";".join(f"{name}={source}" for name, source, _, _ in MUTANTS))
    if args.write:
        name, out = args.write
        for known, source, old, new in MUTANTS:
            if known == name:
                pathlib.Path(out).write_text(mutated(source, old, new))
                return 0
        sys.exit(f"mutants.py: there is no mutant '{name}'")
    if args.run:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            results = list(pool.map(lambda m: catch(m[0], args.run, args.schedules_max), MUTANTS))
        for name, caught, text in results:
            print(f"{'caught' if caught else 'MISSED'}  {name}: {text}")
        return 0 if all(caught for _, caught, _ in results) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
