// ort_api.h - the few entries of ONNX Runtime's C function table that this library calls.
//
// The table is frozen: an entry keeps its index and signature for ever, new ones are appended. Entries below exist
// since API version 8 (ONNX Runtime 1.8), the version this library asks for, so any later release works; those of the
// CUDA provider since version 17.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lococo::ort {

struct Status;
struct Env;
struct Session;
struct SessionOptions;
struct RunOptions;
struct Value;
struct MemoryInfo;
struct ThreadingOptions;
struct IoBinding;
struct CudaProviderOptions;

constexpr uint32_t kApiVersion = 8;
constexpr uint32_t kCudaApiVersion = 17;

enum LogLevel : int { kLogInfo = 1, kLogWarning = 2, kLogError = 3 };
enum ErrorCode : int { kNotImplemented = 9, kInvalidGraph = 10 };
enum ElementType : int { kFloat32 = 1, kInt32 = 6, kInt64 = 7, kFloat16 = 10, kBfloat16 = 16 };
constexpr int kOptimizeAll = 99;
constexpr int kDeviceAllocator = 0;  // memory of ours, no arena
constexpr int kDefaultMemory = 0;
constexpr const char* kCudaMemory = "Cuda";
constexpr const char* kCudaProvider = "CUDAExecutionProvider";

using LogFunction = void (*)(void* user, LogLevel level, const char* category, const char* id, const char* location,
                             const char* message);

// X(index in the table, name, result, arguments)
#define LOCOCO_ORT_ENTRIES(X)                                                                                         \
  X(1, GetErrorCode, ErrorCode, (const Status*))                                                                      \
  X(2, GetErrorMessage, const char*, (const Status*))                                                                 \
  X(7, CreateSession, Status*, (const Env*, const char* path, const SessionOptions*, Session**))                      \
  X(10, CreateSessionOptions, Status*, (SessionOptions**))                                                            \
  X(17, DisableMemPattern, Status*, (SessionOptions*))                                                                \
  X(23, SetSessionGraphOptimizationLevel, Status*, (SessionOptions*, int level))                                      \
  X(39, CreateRunOptions, Status*, (RunOptions**))                                                                    \
  X(49, CreateTensorWithDataAsOrtValue, Status*,                                                                      \
    (const MemoryInfo*, void* data, size_t nbytes, const int64_t* shape, size_t rank, ElementType, Value**))          \
  X(68, CreateMemoryInfo, Status*, (const char* name, int allocator_type, int device, int memory_type, MemoryInfo**)) \
  X(69, CreateCpuMemoryInfo, Status*, (int allocator_type, int memory_type, MemoryInfo**))                            \
  X(92, ReleaseEnv, void, (Env*))                                                                                     \
  X(93, ReleaseStatus, void, (Status*))                                                                               \
  X(94, ReleaseMemoryInfo, void, (MemoryInfo*))                                                                       \
  X(95, ReleaseSession, void, (Session*))                                                                             \
  X(96, ReleaseValue, void, (Value*))                                                                                 \
  X(97, ReleaseRunOptions, void, (RunOptions*))                                                                       \
  X(100, ReleaseSessionOptions, void, (SessionOptions*))                                                              \
  X(120, DisablePerSessionThreads, Status*, (SessionOptions*))                                                        \
  X(121, CreateThreadingOptions, Status*, (ThreadingOptions**))                                                       \
  X(122, ReleaseThreadingOptions, void, (ThreadingOptions*))                                                          \
  X(125, GetAvailableProviders, Status*, (char*** names, int* count))                                                 \
  X(126, ReleaseAvailableProviders, Status*, (char** names, int count))                                               \
  X(130, AddSessionConfigEntry, Status*, (SessionOptions*, const char* key, const char* value))                       \
  X(133, RunWithBinding, Status*, (Session*, const RunOptions*, const IoBinding*))                                    \
  X(134, CreateIoBinding, Status*, (Session*, IoBinding**))                                                           \
  X(135, ReleaseIoBinding, void, (IoBinding*))                                                                        \
  X(136, BindInput, Status*, (IoBinding*, const char* name, const Value*))                                            \
  X(137, BindOutput, Status*, (IoBinding*, const char* name, const Value*))                                           \
  X(147, SetGlobalIntraOpNumThreads, Status*, (ThreadingOptions*, int num_threads))                                   \
  X(148, SetGlobalInterOpNumThreads, Status*, (ThreadingOptions*, int num_threads))                                   \
  X(151, CreateEnvWithCustomLoggerAndGlobalThreadPools, Status*,                                                      \
    (LogFunction, void* user, LogLevel, const char* id, const ThreadingOptions*, Env**))

#define LOCOCO_ORT_CUDA_ENTRIES(X)                                                                              \
  X(204, SessionOptionsAppendExecutionProvider_CUDA_V2, Status*, (SessionOptions*, const CudaProviderOptions*)) \
  X(205, CreateCUDAProviderOptions, Status*, (CudaProviderOptions**))                                           \
  X(206, UpdateCUDAProviderOptions, Status*,                                                                    \
    (CudaProviderOptions*, const char* const* keys, const char* const* values, size_t count))                   \
  X(208, ReleaseCUDAProviderOptions, void, (CudaProviderOptions*))                                              \
  X(273, SetDeterministicCompute, Status*, (SessionOptions*, bool))

// The table as structs of typed functions.
#define LOCOCO_ORT_ASSIGN(index, name, result, args) name = reinterpret_cast<result(*) args>(table[index]);
#define LOCOCO_ORT_MEMBER(index, name, result, args) result(*name) args;
struct Api {
  explicit Api(void* const* table){LOCOCO_ORT_ENTRIES(LOCOCO_ORT_ASSIGN)} LOCOCO_ORT_ENTRIES(LOCOCO_ORT_MEMBER)
};
struct CudaApi {
  explicit CudaApi(void* const* table){
      LOCOCO_ORT_CUDA_ENTRIES(LOCOCO_ORT_ASSIGN)} LOCOCO_ORT_CUDA_ENTRIES(LOCOCO_ORT_MEMBER)
};
#undef LOCOCO_ORT_ASSIGN
#undef LOCOCO_ORT_MEMBER

// What the library's one exported symbol, OrtGetApiBase, returns.
struct ApiBase {
  void* const* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

}  // namespace lococo::ort
