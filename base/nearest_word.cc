// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <numeric>

#include "base/config.h"

namespace zerod {
namespace {

// Words beyond this are nobody's typo, and the distance costs the product of the lengths.
constexpr size_t kWordBytesMax = 128;

// Levenshtein's distance: single characters inserted, removed or replaced.
size_t EditDistance(absl::string_view a, absl::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({replaced, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row[b.size()];
}

}  // namespace

std::string NearestWord(absl::string_view word, const std::vector<std::string>& known) {
  if (word.size() > kWordBytesMax) return "";
  const std::string* nearest = nullptr;
  size_t distance_best = word.size() / 2 + 1;
  for (const std::string& candidate : known) {
    const size_t distance = EditDistance(word, candidate);
    if (distance >= distance_best) continue;
    distance_best = distance;
    nearest = &candidate;
  }
  return nearest == nullptr ? "" : *nearest;
}

}  // namespace zerod
