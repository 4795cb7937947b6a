// SPDX-License-Identifier: Apache-2.0
//
// absl::Status to gRPC's and back: the codes are the same numbers.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "grpcpp/support/status.h"

namespace zerod::server {

// The text travels in HTTP/2 headers, which gRPC bounds at 8 KiB, percent-encoded: `bytes_max`
// counts it so, and a longer one is cut where it can be.
inline grpc::Status ToGrpc(const absl::Status& status, size_t bytes_max = 3000) {
  if (status.ok()) return grpc::Status::OK;
  std::string text(status.message());
  size_t bytes = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const bool plain = text[i] >= 0x20 && text[i] < 0x7f && text[i] != '%';
    bytes += plain ? 1 : 3;
    if (bytes > bytes_max) {
      while (i > 0 && (text[i] & 0xc0) == 0x80) --i;  // not within a character of UTF-8
      text.resize(i);
      text += " ... (the rest is in the daemon's log)";
      break;
    }
  }
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), text);
}

inline absl::Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  const int code = static_cast<int>(status.error_code());
  return absl::Status(code > 0 && code <= 16 ? static_cast<absl::StatusCode>(code)
                                             : absl::StatusCode::kUnknown,
                      status.error_message());
}

}  // namespace zerod::server
