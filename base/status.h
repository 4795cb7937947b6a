// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// Returns from the enclosing function when `expr` (an absl::Status) is not OK.
#define RETURN_IF_ERROR(expr)                          \
  do {                                                 \
    absl::Status zerod_status_ = (expr);               \
    if (!zerod_status_.ok()) return zerod_status_;     \
  } while (false)

#define ZEROD_CONCAT_INNER(a, b) a##b
#define ZEROD_CONCAT(a, b) ZEROD_CONCAT_INNER(a, b)
// ASSIGN_OR_RETURN(auto x, StatusOrExpression());
#define ASSIGN_OR_RETURN(lhs, expr) \
  ASSIGN_OR_RETURN_IMPL(ZEROD_CONCAT(zerod_statusor_, __LINE__), lhs, expr)
#define ASSIGN_OR_RETURN_IMPL(tmp, lhs, expr) \
  auto tmp = (expr);                          \
  if (!tmp.ok()) return tmp.status();         \
  lhs = std::move(tmp).value()
