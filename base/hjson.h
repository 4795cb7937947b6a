// SPDX-License-Identifier: Apache-2.0
//
// Hjson to a document: what DeepSpeed's loader takes. JSON with //, /* */ and # comments, commas
// that may trail or be left out at the end of a line, keys without quotes, ' as a quote, ''' for
// text of several lines, strings without quotes (to the end of their line), and no braces around
// the whole. NaN and Infinity are numbers, as Python writes them. Private to base/.
#pragma once

#include "absl/strings/string_view.h"
#include "base/config_json.h"

namespace zerod {

// A key given twice is a problem beside the document that is returned; a syntax error, with its
// line and column, is the last problem and null is returned. `text` is at most 1 MiB and 32 levels
// deep, else that is the problem.
Json ParseHjson(absl::string_view text, ConfigProblems* problems);

}  // namespace zerod
