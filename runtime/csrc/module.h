/* module.h - the boundary between liblococo and a backend compiled on its own, such as liblococo_trt.
 *
 * The two may be built by different compilers and hold different C++ libraries, so only C crosses: a table of
 * functions, plain structs, a status, and a text where something failed. No exception leaves either side. liblococo
 * reads and checks every file and lays out the memory; a module talks to the device.
 *
 * Strings and arrays passed in live until the call returns. Every function that returns a status writes `error` when
 * it is not LOCOCO_OK.
 */
#ifndef LOCOCO_MODULE_H
#define LOCOCO_MODULE_H

#include <stddef.h>
#include <stdint.h>

#include "lococo.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever anything below changes; both sides compare it before anything else. */
#define LOCOCO_MODULE_ABI 3
#define LOCOCO_MODULE_ENTRY "lococo_backend_module"

typedef struct lococo_module_backend lococo_module_backend;   /* engines and weights of one bundle on one device */
typedef struct lococo_module_executor lococo_module_executor; /* the buffers of one session */

typedef struct lococo_module_error {
  char text[3072];
} lococo_module_error;

/* What a module needs of liblococo. */
typedef struct lococo_module_host {
  void (*log)(lococo_log_level level, const char* text); /* any thread */
} lococo_module_host;

typedef enum lococo_module_dtype {
  LOCOCO_MODULE_FLOAT32 = 0,
  LOCOCO_MODULE_FLOAT16 = 1,
  LOCOCO_MODULE_BFLOAT16 = 2,
  LOCOCO_MODULE_INT32 = 3,
} lococo_module_dtype;

#define LOCOCO_MODULE_MAX_RANK 8
#define LOCOCO_MODULE_NO_OFFSET UINT64_MAX

/* An input or output of a graph, and where it lies. */
typedef struct lococo_module_tensor {
  const char* name;
  lococo_module_dtype dtype;
  int32_t rank;
  int64_t shape[LOCOCO_MODULE_MAX_RANK];
  int32_t is_input;
  int32_t is_weight; /* offset counts from the start of the weights, else from the start of the executor's arena */
  uint64_t offset;   /* LOCOCO_MODULE_NO_OFFSET: memory of the call (logits of a whole block) */
} lococo_module_tensor;

typedef enum lococo_module_kind {
  LOCOCO_MODULE_DECODER = 0,
  LOCOCO_MODULE_FUSION = 1,
  LOCOCO_MODULE_LM_HEAD = 2,
} lococo_module_kind;

typedef struct lococo_module_graph {
  lococo_module_kind kind;
  int32_t tokens;
  const char* name; /* for messages */
  const void* plan; /* checked already */
  uint64_t plan_bytes;
  uint64_t workspace_bytes; /* as measured when it was built; 0: not known */
  const lococo_module_tensor* tensors;
  int32_t num_tensors;
} lococo_module_graph;

/* Where things lie in an executor's arena: offsets in bytes, multiples of 256. */
typedef struct lococo_module_layout {
  uint64_t arena_bytes;
  /* position, past_length, num_tokens, input_ids (block_size), chooser: written by one copy from host memory */
  uint64_t inputs, inputs_bytes;
  uint64_t position, past_length, num_tokens, input_ids; /* int32 each, inside inputs */
  uint64_t state, state_bytes;                           /* logits, then the cache: the order of the state file */
  uint64_t logits, logits_bytes;
  uint64_t cache, cache_bytes;         /* K and V of every layer, then accumulated scores: the rest of the state */
  uint64_t past_scores, scores_bytes;  /* inside cache, its end; 0 bytes if scores do not accumulate */
  uint64_t fused;                      /* what a fusion writes, laid out as cache */
  uint64_t new_kv, new_kv_stride;      /* K0, V0, K1, ...: one stride apart, [H_kv, w, d] each */
  uint64_t scores, scores_stride;      /* one stride a layer, [H_kv, C + w] float32 */
  uint64_t hidden;                     /* [1, w, hidden] of the last block */
  uint64_t kv_stride, past_stride;     /* between tensors of cache: K and V, accumulated scores */
  uint64_t saved_logits, saved_scores; /* of the start of a window */
  uint64_t chooser;                    /* inside inputs: 32 bytes of the arg max, zero at the start of a window */
  uint64_t ring;                       /* (C - M + 1) int32: tokens chosen on the device */
} lococo_module_layout;

typedef struct lococo_module_bundle {
  int32_t device; /* CUDA's number */
  int32_t vocab_size, num_layers, num_kv_heads, head_dim;
  int32_t mem_size, capacity, block_size; /* M, C, B */
  int32_t element_bytes;                  /* of K and V */
  int32_t host_code_allowed;              /* version-compatible plans carry code for the host */
  const void* weights;                    /* copied to the device once; NULL if plans hold their own */
  uint64_t weights_bytes;
  const lococo_module_graph* graphs;
  int32_t num_graphs;
  lococo_module_layout layout;
} lococo_module_bundle;

typedef struct lococo_module_forward {
  const int32_t* ids; /* (n) */
  int32_t n;
  int32_t width;    /* of the graph that reads them */
  int32_t length;   /* live slots before */
  int64_t position; /* of ids[0] */
  int32_t fuses;    /* a fusion follows, else the new slots join the state */
} lococo_module_forward;

typedef struct lococo_module {
  uint32_t abi;
  const char* backend; /* "tensorrt" */

  /* The CUDA runtime inside the module, 13000 for 13.0: the driver must be at least of this major. */
  int32_t cuda_version;

  /* Loads the engine's library; touches no device. version: "8.6.0", lives as long as the process. */
  lococo_status (*load)(const lococo_module_host* host, const char** version, lococo_module_error* error);

  lococo_status (*open)(const lococo_module_bundle* bundle, lococo_module_backend** out, lococo_module_error* error);
  void (*close)(lococo_module_backend* backend);
  uint64_t (*executor_bytes)(const lococo_module_backend* backend);

  /* Executors belong to one thread at a time; a backend must outlive them. */
  lococo_status (*create)(lococo_module_backend* backend, lococo_module_executor** out, lococo_module_error* error);
  void (*destroy)(lococo_module_executor* executor);
  /* Reads the tokens and updates the state. all_logits: NULL or (n, vocab_size). May return before the device is done.
   */
  lococo_status (*forward)(lococo_module_executor* executor, const lococo_module_forward* f, float* all_logits,
                           lococo_module_error* error);
  /* Waits for the device. */
  lococo_status (*finish)(lococo_module_executor* executor, lococo_module_error* error);
  /* Greedy decoding of C - M + 1 tokens from M live slots on, fusion included. ids: (C - M + 1), each chosen before it
   * was read. Until end_window the state is as it was; keep: 1 makes the new one the state, 0 forgets it.
   * May return before the device is done. idle_seconds: what the device waited since the window before, if that was
   * kept and nothing came between; else 0. */
  lococo_status (*run_window)(lococo_module_executor* executor, int64_t position, int32_t* ids, double* idle_seconds,
                              lococo_module_error* error);
  lococo_status (*end_window)(lococo_module_executor* executor, int32_t keep, lococo_module_error* error);
  /* (vocab_size), in host memory, valid until the next call. */
  lococo_status (*logits)(lococo_module_executor* executor, const float** logits, lococo_module_error* error);
  lococo_status (*reset)(lococo_module_executor* executor, lococo_module_error* error);
  /* The state's tensors, tight. */
  lococo_status (*read_state)(lococo_module_executor* executor, uint8_t* bytes, lococo_module_error* error);
  lococo_status (*write_state)(lococo_module_executor* executor, const uint8_t* bytes, lococo_module_error* error);
  lococo_status (*copy_state)(lococo_module_executor* to, lococo_module_executor* from, lococo_module_error* error);
} lococo_module;

/* The one symbol of a module. NULL if it does not speak this ABI. */
typedef const lococo_module* (*lococo_backend_module_fn)(uint32_t abi);

#ifdef __cplusplus
}
#endif
#endif
