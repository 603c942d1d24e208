// What the stand-in for CUDA keeps: counters, streams, captures, memory. Kernels do nothing and are counted by name.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))
inline std::recursive_mutex mu;
#define LOCK std::lock_guard<std::recursive_mutex> guard(mu)
inline std::map<std::string, long long>& counters() {
  static auto* c = new std::map<std::string, long long>;
  return *c;
}
inline std::map<std::string, long long>& launched() {
  static auto* c = new std::map<std::string, long long>;
  return *c;
}
inline std::unordered_map<const void*, std::string>& names() {
  static auto* c = new std::unordered_map<const void*, std::string>;
  return *c;
}
inline std::map<uintptr_t, size_t>& blocks() {
  static auto* c = new std::map<uintptr_t, size_t>;
  return *c;
}
inline void (*callback)(const char*) = nullptr;
inline int bool_value = -1;
inline size_t total = (size_t)80 << 30, used = 0;
inline void count(const char* n, long long by = 1) {
  LOCK;
  counters()[n] += by;
}
inline void tell(const char* what) {
  auto cb = callback;
  if (cb) cb(what);
}
struct Graph {
  std::vector<std::string> nodes;
  int kernels = 0;
};
struct Stream {
  bool capturing = false;
  bool invalid = false;
  cudaStreamCaptureMode mode;
  unsigned long long id = 0;
  Graph* graph = nullptr;
  bool origin = false;
  int prio = 0;
};
struct Event {
  Graph* graph = nullptr;
  unsigned long long id = 0;
  cudaStreamCaptureMode mode;
};
inline Stream legacy;
inline Stream* S(const void* s) { return (s == nullptr || s == (void*)1 || s == (void*)2) ? &legacy : (Stream*)s; }
inline int active_global = 0;
inline thread_local int active_here = 0;
inline unsigned long long next_id = 1;
inline thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
inline thread_local cudaError_t last = cudaSuccess;
inline std::vector<Stream*> capturing_streams;
inline cudaError_t fail(cudaError_t e) {
  last = e;
  return e;
}
// Whether `what`, a call that may be unsafe during a capture, is one: during any capture in global mode, and during
// this thread's own in thread-local mode, unless the thread has relaxed its own mode.
inline cudaError_t unsafe(const char* what) {
  LOCK;
  bool forbidden = (active_global > 0 && thread_mode == cudaStreamCaptureModeGlobal) ||
                   (active_here > 0 && thread_mode != cudaStreamCaptureModeRelaxed);
  if (forbidden) {
    counters()[std::string("ILLEGAL DURING CAPTURE: ") + what]++;
    for (auto* s : capturing_streams) s->invalid = true;
    tell((std::string("illegal during capture: ") + what).c_str());
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}
inline void launch(const std::string& name, const void* stream, bool kernel = true) {
  LOCK;
  Stream* s = S(stream);
  if (s->capturing) {
    s->graph->nodes.push_back(name);
    s->graph->kernels += kernel;
    counters()[kernel ? "captured kernels" : "captured copies"]++;
    launched()["captured " + name]++;
    return;
  }
  if (active_global) counters()["launched beside a capture"]++;
  counters()[kernel ? "kernels" : "copies"]++;
  launched()[name]++;
}
inline std::string name_of(const void* f) {
  LOCK;
  auto it = names().find(f);
  return it == names().end() ? "?" : it->second;
}
