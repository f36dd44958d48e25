// ort_api.h - the few entries of ONNX Runtime's C function table that this library calls.
//
// The table is frozen: an entry keeps its index and signature for ever, new ones are appended. All entries below exist
// since API version 8 (ONNX Runtime 1.8), the version this library asks for, so any later release works.
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

constexpr uint32_t kApiVersion = 8;

enum LogLevel : int { kLogInfo = 1, kLogWarning = 2, kLogError = 3 };
enum ErrorCode : int { kNotImplemented = 9 };
enum ElementType : int { kFloat32 = 1, kInt32 = 6, kInt64 = 7, kFloat16 = 10, kBfloat16 = 16 };
constexpr int kOptimizeAll = 99;
constexpr int kDeviceAllocator = 0;  // memory of ours, no arena
constexpr int kDefaultMemory = 0;

using LogFunction = void (*)(void* user, LogLevel level, const char* category, const char* id, const char* location,
                             const char* message);

// X(index in the table, name, result, arguments)
#define LOCOCO_ORT_ENTRIES(X)                                                                                \
  X(1, GetErrorCode, ErrorCode, (const Status*))                                                             \
  X(2, GetErrorMessage, const char*, (const Status*))                                                        \
  X(7, CreateSession, Status*, (const Env*, const char* path, const SessionOptions*, Session**))             \
  X(10, CreateSessionOptions, Status*, (SessionOptions**))                                                   \
  X(17, DisableMemPattern, Status*, (SessionOptions*))                                                       \
  X(23, SetSessionGraphOptimizationLevel, Status*, (SessionOptions*, int level))                             \
  X(39, CreateRunOptions, Status*, (RunOptions**))                                                           \
  X(49, CreateTensorWithDataAsOrtValue, Status*,                                                             \
    (const MemoryInfo*, void* data, size_t nbytes, const int64_t* shape, size_t rank, ElementType, Value**)) \
  X(69, CreateCpuMemoryInfo, Status*, (int allocator_type, int memory_type, MemoryInfo**))                   \
  X(92, ReleaseEnv, void, (Env*))                                                                            \
  X(93, ReleaseStatus, void, (Status*))                                                                      \
  X(94, ReleaseMemoryInfo, void, (MemoryInfo*))                                                              \
  X(95, ReleaseSession, void, (Session*))                                                                    \
  X(96, ReleaseValue, void, (Value*))                                                                        \
  X(97, ReleaseRunOptions, void, (RunOptions*))                                                              \
  X(100, ReleaseSessionOptions, void, (SessionOptions*))                                                     \
  X(120, DisablePerSessionThreads, Status*, (SessionOptions*))                                               \
  X(121, CreateThreadingOptions, Status*, (ThreadingOptions**))                                              \
  X(122, ReleaseThreadingOptions, void, (ThreadingOptions*))                                                 \
  X(130, AddSessionConfigEntry, Status*, (SessionOptions*, const char* key, const char* value))              \
  X(133, RunWithBinding, Status*, (Session*, const RunOptions*, const IoBinding*))                           \
  X(134, CreateIoBinding, Status*, (Session*, IoBinding**))                                                  \
  X(135, ReleaseIoBinding, void, (IoBinding*))                                                               \
  X(136, BindInput, Status*, (IoBinding*, const char* name, const Value*))                                   \
  X(137, BindOutput, Status*, (IoBinding*, const char* name, const Value*))                                  \
  X(147, SetGlobalIntraOpNumThreads, Status*, (ThreadingOptions*, int num_threads))                          \
  X(148, SetGlobalInterOpNumThreads, Status*, (ThreadingOptions*, int num_threads))                          \
  X(151, CreateEnvWithCustomLoggerAndGlobalThreadPools, Status*,                                             \
    (LogFunction, void* user, LogLevel, const char* id, const ThreadingOptions*, Env**))

// The table as a struct of typed functions.
struct Api {
  explicit Api(void* const* table){
#define LOCOCO_ORT_ASSIGN(index, name, result, args) name = reinterpret_cast<result(*) args>(table[index]);
      LOCOCO_ORT_ENTRIES(LOCOCO_ORT_ASSIGN)
#undef LOCOCO_ORT_ASSIGN
  }

#define LOCOCO_ORT_MEMBER(index, name, result, args) result(*name) args;
  LOCOCO_ORT_ENTRIES(LOCOCO_ORT_MEMBER)
#undef LOCOCO_ORT_MEMBER
};

// What the library's one exported symbol, OrtGetApiBase, returns.
struct ApiBase {
  void* const* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

}  // namespace lococo::ort
