// The CUDA driver and cuBLAS without a GPU.
#include "state.h"

int attribute(int a);

struct Func {
  std::string name;
};
#undef cuModuleLoadDataEx
#undef cuDeviceGetCount
EXPORT CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetCount(int* n) {
  *n = 1;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDriverGetVersion(int* v) {
  *v = 13000;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGet(CUdevice* d, int i) {
  *d = i;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice) {
  *v = attribute((int)a);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* f, int* a) {
  *f = 0;
  *a = 1;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice) {
  *c = (CUcontext)0x10;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext* c) {
  *c = (CUcontext)0x10;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetDevice(CUdevice* d) {
  *d = 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetLimit(size_t* v, CUlimit) {
  *v = 1 << 20;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorString(CUresult, const char** s) {
  *s = "fake";
  return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorName(CUresult, const char** s) {
  *s = "fake";
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoad(CUmodule* m, const char*) {
  *m = (CUmodule)calloc(1, 64);
  count("modules loaded");
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoadData(CUmodule* m, const void*) {
  *m = (CUmodule)calloc(1, 64);
  count("modules loaded");
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoadDataEx(CUmodule* m, const void*, unsigned, CUjit_option*, void**) {
  *m = (CUmodule)calloc(1, 64);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
EXPORT CUresult cuModuleGetFunction(CUfunction* f, CUmodule, const char* n) {
  *f = (CUfunction) new Func{n};
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction) {
  *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
EXPORT CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
EXPORT CUresult cuLaunchKernel(CUfunction f, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                               CUstream s, void**, void**) {
  launch("triton:" + ((Func*)f)->name, s);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void**, void**) {
  launch("triton:" + ((Func*)f)->name, c->hStream);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                          unsigned, CUstream s, void**) {
  launch("triton:" + ((Func*)f)->name, s);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction, int, size_t) {
  *n = 2;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) {
  *n = 1;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuPointerGetAttribute(void* v, CUpointer_attribute, CUdeviceptr p) {
  *(CUdeviceptr*)v = p;
  return CUDA_SUCCESS;
}
// cuBLAS
EXPORT int cublasCreate_v2(void** h) {
  *h = calloc(1, 4096);
  return 0;
}
EXPORT int cublasGetMathMode(void*, int* m) {
  *m = 0;
  return 0;
}
EXPORT int cublasGetPointerMode_v2(void*, int* m) {
  *m = 0;
  return 0;
}
static thread_local void* blas_stream = nullptr;
EXPORT int cublasSetStream_v2(void*, void* s) {
  blas_stream = s;
  return 0;
}
#define GEMM(n)                        \
  EXPORT int n(...) {                  \
    launch("cublas:" #n, blas_stream); \
    return 0;                          \
  }
GEMM(cublasGemmEx)
GEMM(cublasSgemm_v2)
GEMM(cublasSgemmEx)
GEMM(cublasGemmStridedBatchedEx)
GEMM(cublasSgemmStridedBatched)
GEMM(cublasSgemv_v2)
GEMM(cublasDotEx)
GEMM(cublasSdot_v2)

EXPORT int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*,
                          void*, void*, void*, const void*, void*, size_t, void* stream) {
  launch("cublasLt:matmul", stream);
  return 0;
}
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, char* r, int* n) {
  memset(r, 0, 64 + 40);
  *n = 1;
  return 0;
}
EXPORT int cublasLtMatmulAlgoCheck(...) { return 0; }
#define MAKE(n)                 \
  EXPORT int n(void** p, ...) { \
    *p = calloc(1, 4096);       \
    return 0;                   \
  }
MAKE(cublasLtMatmulDescCreate)
MAKE(cublasLtMatrixLayoutCreate)
MAKE(cublasLtMatmulPreferenceCreate)
MAKE(cudnnCreate)
MAKE(cudnnCreateTensorDescriptor)

EXPORT void standin_launch(const char* name, void* stream) { launch(name, stream); }
