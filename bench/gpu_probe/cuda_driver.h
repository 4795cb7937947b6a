// SPDX-License-Identifier: Apache-2.0
//
// The CUDA driver API, loaded at run time: a program that uses it builds and starts where there is
// neither driver nor GPU. Only the driver API is used, so any driver of CUDA 12 or newer will do.
#pragma once

#include <cuda.h>
#include <dlfcn.h>

#include "bench/gpu_probe/probe.h"

#define PROBE_CUDA_FUNCTIONS(X)                                                                   \
  X(cuInit) X(cuDriverGetVersion) X(cuGetErrorName) X(cuDeviceGetCount) X(cuDeviceGet)            \
  X(cuDeviceGetName) X(cuDeviceGetAttribute) X(cuDevicePrimaryCtxRetain) X(cuCtxSetCurrent)       \
  X(cuStreamCreate) X(cuStreamQuery) X(cuStreamWaitEvent) X(cuStreamWriteValue64)                 \
  X(cuStreamWaitValue64) X(cuEventCreate) X(cuEventRecord) X(cuIpcGetEventHandle)                 \
  X(cuIpcOpenEventHandle) X(cuMemAlloc) X(cuMemFree) X(cuMemGetInfo) X(cuMemsetD32Async)          \
  X(cuMemcpyDtoHAsync) X(cuMemcpyHtoDAsync) X(cuMemHostRegister) X(cuMemHostUnregister)           \
  X(cuMemHostAlloc) X(cuMemFreeHost) X(cuMemGetAllocationGranularity) X(cuMemCreate)              \
  X(cuMemRelease) X(cuMemExportToShareableHandle) X(cuMemImportFromShareableHandle)               \
  X(cuMemAddressReserve) X(cuMemAddressFree) X(cuMemMap) X(cuMemUnmap) X(cuMemSetAccess)

namespace probe {

struct Driver {
#define PROBE_DECLARE(name) decltype(&::name) name = nullptr;
  PROBE_CUDA_FUNCTIONS(PROBE_DECLARE)
#undef PROBE_DECLARE
};

// cuda.h renames functions to their current version (cuMemAlloc is cuMemAlloc_v2): the symbol
// looked up is the one that the prototype belongs to.
#define PROBE_STRING(name) #name
#define PROBE_SYMBOL(name) PROBE_STRING(name)

// Returns "" or why there is no driver. The members' names go through the same renaming as the
// uses, so driver.cuMemAlloc works.
inline std::string LoadDriver(Driver* driver) {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return std::string("no CUDA driver: ") + dlerror();
#define PROBE_LOAD(name)                                                                       \
  driver->name = reinterpret_cast<decltype(driver->name)>(dlsym(library, PROBE_SYMBOL(name))); \
  if (driver->name == nullptr) return "the CUDA driver is too old, it lacks " PROBE_SYMBOL(name);
  PROBE_CUDA_FUNCTIONS(PROBE_LOAD)
#undef PROBE_LOAD
  return "";
}

inline std::string CudaError(const Driver& cu, CUresult result) {
  const char* name = nullptr;
  cu.cuGetErrorName(result, &name);
  return name != nullptr ? name : Format("CUDA error %d", static_cast<int>(result));
}

// Makes GPU 0's primary context current in this thread. CUDA does not survive a fork: only
// processes that fork no more may call this. Returns "" or why there is no GPU.
inline std::string StartGpu(Driver* cu, CUdevice* device) {
  const std::string reason = LoadDriver(cu);
  if (!reason.empty()) return reason;
  CUresult result = cu->cuInit(0);
  if (result != CUDA_SUCCESS) return "cuInit: " + CudaError(*cu, result);
  int count = 0;
  if (cu->cuDeviceGetCount(&count) != CUDA_SUCCESS || count == 0) return "no CUDA device";
  CUcontext context = nullptr;
  result = cu->cuDeviceGet(device, 0);
  if (result == CUDA_SUCCESS) result = cu->cuDevicePrimaryCtxRetain(&context, *device);
  if (result == CUDA_SUCCESS) result = cu->cuCtxSetCurrent(context);
  return result == CUDA_SUCCESS ? "" : "no context on the GPU: " + CudaError(*cu, result);
}

// Asks in a child, so that the caller may fork afterwards. Adds the device and the driver to
// `figures`; returns "" or why there is no GPU.
inline std::string DescribeGpu(Figures* figures) {
  int pipes[2];
  if (pipe(pipes) != 0) return strerror(errno);
  const pid_t child = Spawn([&] {
    Driver cu;
    CUdevice device = 0;
    std::string text = StartGpu(&cu, &device);
    const int code = text.empty() ? kAnswered : kCannotBeHad;
    if (text.empty()) {
      char name[128] = "";
      int version = 0;
      cu.cuDeviceGetName(name, sizeof(name), device);
      cu.cuDriverGetVersion(&version);
      text = Format("%s, driver for CUDA %d.%d", name, version / 1000, version % 1000 / 10);
    }
    return write(pipes[1], text.data(), text.size()) < 0 ? kFailed : code;
  });
  close(pipes[1]);
  const int code = Await(child, 60);
  char text[512] = "";
  const ssize_t got = read(pipes[0], text, sizeof(text) - 1);
  close(pipes[0]);
  if (code == kAnswered) figures->Text("gpu", text);
  if (code == kAnswered) return "";
  return got > 0 ? text : "the check for a GPU did not end well";
}

// Ends this process with a sentence on stderr where `call` fails: the probe's parent reports it.
#define CU_OK(cu, call)                                                                     \
  do {                                                                                      \
    const CUresult cu_result_ = (cu).call;                                                  \
    if (cu_result_ != CUDA_SUCCESS) {                                                       \
      fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call,                         \
              ::probe::CudaError(cu, cu_result_).c_str());                                  \
      _exit(::probe::kFailed);                                                              \
    }                                                                                       \
  } while (false)

// Waits for the stream, spinning; false where the deadline came first.
inline bool Drain(const Driver& cu, CUstream stream, double timeout_seconds) {
  const double deadline = NowSeconds() + timeout_seconds;
  for (;;) {
    const CUresult result = cu.cuStreamQuery(stream);
    if (result == CUDA_SUCCESS) return true;
    if (result != CUDA_ERROR_NOT_READY) CU_OK(cu, cuStreamQuery(stream));
    if (NowSeconds() > deadline) return false;
  }
}

// Physical memory of GPU 0 mapped read-write at an address of this process.
struct VmmBlock {
  CUmemGenericAllocationHandle handle = 0;
  CUdeviceptr address = 0;
  size_t bytes = 0;
};

inline size_t VmmRound(const Driver& cu, size_t bytes, CUmemAllocationProp* prop) {
  *prop = {};
  prop->type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop->location.type = CU_MEM_LOCATION_TYPE_DEVICE;  // id 0
  prop->requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  size_t grain = 0;
  CU_OK(cu, cuMemGetAllocationGranularity(&grain, prop, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED));
  return (bytes + grain - 1) / grain * grain;
}

inline void VmmMap(const Driver& cu, VmmBlock* block) {
  CUmemAccessDesc access = {};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;  // id 0
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  CU_OK(cu, cuMemAddressReserve(&block->address, block->bytes, 0, 0, 0));
  CU_OK(cu, cuMemMap(block->address, block->bytes, 0, block->handle, 0));
  CU_OK(cu, cuMemSetAccess(block->address, block->bytes, &access, 1));
}

// Creates, maps and exports; the caller closes *fd.
inline VmmBlock VmmExport(const Driver& cu, size_t bytes, int* fd) {
  VmmBlock block;
  CUmemAllocationProp prop;
  block.bytes = VmmRound(cu, bytes, &prop);
  CU_OK(cu, cuMemCreate(&block.handle, block.bytes, &prop, 0));
  VmmMap(cu, &block);
  CU_OK(cu, cuMemExportToShareableHandle(fd, block.handle,
                                         CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
  return block;
}

inline VmmBlock VmmImport(const Driver& cu, size_t bytes, int fd) {
  VmmBlock block;
  CUmemAllocationProp prop;
  block.bytes = VmmRound(cu, bytes, &prop);
  CU_OK(cu, cuMemImportFromShareableHandle(&block.handle,
                                           reinterpret_cast<void*>(static_cast<intptr_t>(fd)),
                                           CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
  VmmMap(cu, &block);
  return block;
}

inline void VmmUnmap(const Driver& cu, const VmmBlock& block) {
  CU_OK(cu, cuMemUnmap(block.address, block.bytes));
  CU_OK(cu, cuMemAddressFree(block.address, block.bytes));
  CU_OK(cu, cuMemRelease(block.handle));
}

}  // namespace probe
