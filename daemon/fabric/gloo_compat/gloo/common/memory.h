// SPDX-License-Identifier: Apache-2.0
//
// Debian's libgloo-dev installs transport/tcp/*.h, which include <gloo/common/memory.h>, without
// that file. The three class templates that those headers name are declared here anew. The
// library's own code was compiled against the original, so what is fixed is the representation
// (one std::shared_ptr or std::weak_ptr each) and the meaning: a buffer's root reference is not
// its owner, and its destructor waits until no thread is using the buffer through a strong
// reference. CMake uses this folder only where the installed Gloo lacks the file.
#pragma once

#include <memory>
#include <thread>

namespace gloo {

template <typename T>
class ShareableNonOwningPtr final {
 public:
  explicit ShareableNonOwningPtr(T* object) : root(std::shared_ptr<T>(object, [](T*) {})) {}
  ShareableNonOwningPtr(const ShareableNonOwningPtr&) = delete;
  ShareableNonOwningPtr& operator=(const ShareableNonOwningPtr&) = delete;
  ~ShareableNonOwningPtr() {
    const std::weak_ptr<T> users = root;
    for (root.reset(); !users.expired();) std::this_thread::yield();
  }

  std::shared_ptr<T> root;
};

template <typename T>
class WeakNonOwningPtr final {
 public:
  WeakNonOwningPtr() = default;
  explicit WeakNonOwningPtr(const ShareableNonOwningPtr<T>& of) : reference(of.root) {}
  // Whether it was ever made from a root, alive or not.
  explicit operator bool() const noexcept {
    const std::weak_ptr<T> none;
    return none.owner_before(reference) || reference.owner_before(none);
  }

  std::weak_ptr<T> reference;
};

template <typename T>
class NonOwningPtr final {
 public:
  NonOwningPtr() = default;
  explicit NonOwningPtr(const WeakNonOwningPtr<T>& of) : held(of.reference.lock()) {}
  T* operator->() const noexcept { return held.get(); }
  explicit operator bool() const noexcept { return held != nullptr; }

  std::shared_ptr<T> held;
};

}  // namespace gloo
