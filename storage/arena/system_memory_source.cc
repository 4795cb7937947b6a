// SPDX-License-Identifier: Apache-2.0
//
// What the machine and the cgroups of this process still have. Both cgroup versions are read: on
// a hybrid host the memory controller may be mounted in either.
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/status.h"
#include "storage/arena/arena.h"

namespace zerod::arena {
namespace {

// v1 says "no limit" with a number near 2^63, v2 with "max".
constexpr uint64_t kUnlimited = uint64_t{1} << 62;

// The whole of a small kernel file; nullopt where it does not exist.
absl::StatusOr<std::optional<std::string>> ReadSmallFile(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    if (errno == ENOENT || errno == ENOTDIR) return std::optional<std::string>();
    return absl::FailedPreconditionError(
        absl::StrCat("cannot open ", path, " to learn how much memory there is: ",
                     strerror(errno), "; give the daemon read access to it"));
  }
  std::string text;
  char buffer[4096];
  ssize_t n;
  while ((n = read(fd, buffer, sizeof(buffer))) > 0 || (n < 0 && errno == EINTR)) {
    if (n > 0) text.append(buffer, static_cast<size_t>(n));
  }
  const int error = errno;
  close(fd);
  // ENODEV: the cgroup was removed between open and read.
  if (n < 0 && error == ENODEV) return std::optional<std::string>();
  if (n < 0) {
    return absl::FailedPreconditionError(absl::StrCat("cannot read ", path, ": ", strerror(error)));
  }
  return std::optional<std::string>(std::move(text));
}

// The number in a file that holds one; nullopt: no such file. "max" is kUnlimited.
absl::StatusOr<std::optional<uint64_t>> ReadNumber(const std::string& path) {
  ASSIGN_OR_RETURN(const std::optional<std::string> text, ReadSmallFile(path));
  if (!text.has_value()) return std::optional<uint64_t>();
  const absl::string_view word = absl::StripAsciiWhitespace(*text);
  if (word == "max") return std::optional<uint64_t>(kUnlimited);
  uint64_t value;
  if (!absl::SimpleAtoi(word, &value)) {
    return absl::FailedPreconditionError(absl::StrCat(path, " holds no number: \"", word, "\""));
  }
  return std::optional<uint64_t>(value);
}

// The value behind `key` in "key value" lines (an optional ':' after the key, a unit behind the
// value); nullopt where no line has it.
std::optional<uint64_t> FindValue(absl::string_view text, absl::string_view key) {
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    if (!absl::ConsumePrefix(&line, key)) continue;
    absl::ConsumePrefix(&line, ":");
    const std::pair<absl::string_view, absl::string_view> words =
        absl::StrSplit(absl::StripLeadingAsciiWhitespace(line), absl::MaxSplits(' ', 1));
    uint64_t value;
    if (absl::SimpleAtoi(words.first, &value)) return value;
  }
  return std::nullopt;
}

// One version's names for the same three things.
struct Controller {
  const char* limits[2];  // either may be absent
  const char* usage;
  const char* inactive_key;  // page cache of the whole subtree that can be dropped first
};
constexpr Controller kV1 = {{"memory.limit_in_bytes", nullptr}, "memory.usage_in_bytes",
                            "total_inactive_file"};
// Above memory.high the kernel does not kill but throttles to a crawl: as good as a limit.
constexpr Controller kV2 = {{"memory.max", "memory.high"}, "memory.current", "inactive_file"};

absl::Status ReadGroup(const std::string& folder, const Controller& controller,
                       Available* available) {
  for (const char* limit_name : controller.limits) {
    if (limit_name == nullptr) continue;
    const std::string limit_path = absl::StrCat(folder, "/", limit_name);
    ASSIGN_OR_RETURN(const std::optional<uint64_t> limit, ReadNumber(limit_path));
    if (!limit.has_value() || *limit >= kUnlimited) continue;
    ASSIGN_OR_RETURN(const std::optional<uint64_t> usage,
                     ReadNumber(absl::StrCat(folder, "/", controller.usage)));
    ASSIGN_OR_RETURN(const std::optional<std::string> stat,
                     ReadSmallFile(absl::StrCat(folder, "/memory.stat")));
    const uint64_t inactive =
        stat.has_value() ? FindValue(*stat, controller.inactive_key).value_or(0) : 0;
    const uint64_t used = usage.value_or(0) - std::min(usage.value_or(0), inactive);
    const uint64_t left = *limit - std::min(*limit, used);
    if (left < available->bytes) *available = {left, limit_path};
  }
  return absl::OkStatus();
}

// `path` within `mount` and every cgroup above it, the mount's root included. Where a container
// sees its host's path, or one outside its cgroup namespace ("/../x"), only the folders that
// exist count: the mount's root is then the container's own cgroup.
absl::Status ReadGroupAndAncestors(const std::string& mount, absl::string_view path,
                                   const Controller& controller, Available* available) {
  std::string folder = mount;
  RETURN_IF_ERROR(ReadGroup(folder, controller, available));
  for (absl::string_view part : absl::StrSplit(path, '/', absl::SkipEmpty())) {
    if (part == "..") break;
    absl::StrAppend(&folder, "/", part);
    RETURN_IF_ERROR(ReadGroup(folder, controller, available));
  }
  return absl::OkStatus();
}

class SystemMemorySource : public MemorySource {
 public:
  SystemMemorySource(std::string proc_root, std::string cgroup_root)
      : proc_root_(std::move(proc_root)), cgroup_root_(std::move(cgroup_root)) {}

  absl::StatusOr<Available> Read() override {
    const std::string meminfo_path = absl::StrCat(proc_root_, "/meminfo");
    ASSIGN_OR_RETURN(const std::optional<std::string> meminfo, ReadSmallFile(meminfo_path));
    const std::optional<uint64_t> kib =
        FindValue(meminfo.has_value() ? absl::string_view(*meminfo) : "", "MemAvailable");
    if (!kib.has_value()) {
      return absl::FailedPreconditionError(absl::StrCat(
          meminfo_path, " has no MemAvailable; zerod needs a mounted /proc (Linux 3.14)"));
    }
    Available available{*kib * 1024, absl::StrCat(meminfo_path, " MemAvailable")};

    ASSIGN_OR_RETURN(const std::optional<std::string> groups,
                     ReadSmallFile(absl::StrCat(proc_root_, "/self/cgroup")));
    if (!groups.has_value()) return available;  // a kernel without cgroups
    for (absl::string_view line : absl::StrSplit(*groups, '\n', absl::SkipEmpty())) {
      // hierarchy-ID:controller,controller:path; v2 has ID 0 and no controllers.
      const std::vector<absl::string_view> fields = absl::StrSplit(line, absl::MaxSplits(':', 2));
      if (fields.size() != 3) continue;
      if (fields[0] == "0" && fields[1].empty()) {
        // A host of v2 alone mounts it at the root, a hybrid one under unified/.
        RETURN_IF_ERROR(ReadGroupAndAncestors(cgroup_root_, fields[2], kV2, &available));
        RETURN_IF_ERROR(ReadGroupAndAncestors(absl::StrCat(cgroup_root_, "/unified"), fields[2],
                                              kV2, &available));
        continue;
      }
      for (absl::string_view name : absl::StrSplit(fields[1], ',')) {
        if (name != "memory") continue;
        RETURN_IF_ERROR(ReadGroupAndAncestors(absl::StrCat(cgroup_root_, "/memory"), fields[2],
                                              kV1, &available));
      }
    }
    return available;
  }

 private:
  const std::string proc_root_;
  const std::string cgroup_root_;
};

}  // namespace

std::unique_ptr<MemorySource> MakeSystemMemorySource(std::string proc_root,
                                                     std::string cgroup_root) {
  return std::make_unique<SystemMemorySource>(std::move(proc_root), std::move(cgroup_root));
}

}  // namespace zerod::arena
