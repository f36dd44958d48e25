/* lococo.h - the C interface of the lococo runtime: constant-memory decoding with a LoCoCo slot cache.
 *
 * Ownership      Every *_open / *_create / *_clone gives an opaque handle that the caller destroys with the matching
 *                *_close / *_destroy exactly once; destroying NULL is a no-op. A model must outlive its sessions.
 *                Strings and arrays passed in are copied before the call returns. Pointers handed out belong to the
 *                handle they came from and stay valid until the next call on that handle, unless said otherwise.
 *                A session acquired from a pool is the pool's: it is released, not destroyed.
 * Errors         Every function that can fail returns a lococo_status; results come through the last parameters, which
 *                are written only on LOCOCO_OK. lococo_last_error() explains the last failure of the calling thread.
 *                A failed call leaves the session as it was, except that LOCOCO_ERROR_BACKEND out of prefill, step,
 *                generate or a batch that is a loop marks the session dead: every later call but reset, state_set,
 *                load, destroy and lococo_batch_remove is refused.
 * Threads        A model and a pool may be used from many threads at once. A session belongs to one thread at a time:
 *                a second concurrent call on it is refused with LOCOCO_ERROR_BUSY and changes nothing.
 * Determinism    The same bundle, backend, thread count, tokens and seed give the same bits.
 */
#ifndef LOCOCO_H
#define LOCOCO_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Marks what the library exports. */
#define LOCOCO_API __attribute__((visibility("default")))

/* The release, semantic versioning: before 1.0 a new minor version may change the interface. The build system and the
 * Python package read the numbers here. */
#define LOCOCO_VERSION_MAJOR 0
#define LOCOCO_VERSION_MINOR 1
#define LOCOCO_VERSION_PATCH 0
#define LOCOCO_TEXT_(x) #x
#define LOCOCO_DOTTED_(a, b, c) LOCOCO_TEXT_(a) "." LOCOCO_TEXT_(b) "." LOCOCO_TEXT_(c)
/* The three numbers as text, "0.1.0". */
#define LOCOCO_VERSION LOCOCO_DOTTED_(LOCOCO_VERSION_MAJOR, LOCOCO_VERSION_MINOR, LOCOCO_VERSION_PATCH)

/* The binary interface, and the number in liblococo.so.N. It is raised whenever a program compiled with the header
 * before would misbehave with the library after: a function is removed, or a signature, a struct or the value of a
 * constant changes. New functions and new constants do not raise it. A program compares it with lococo_abi_version()
 * before it calls anything else. */
#define LOCOCO_ABI_VERSION 2

typedef struct lococo_model lococo_model;     /* an opened bundle: weights and graphs, shared by its sessions */
typedef struct lococo_session lococo_session; /* one sequence: slots, cursor, last logits */
typedef struct lococo_stops lococo_stops;     /* stop strings, and the text that may become one of them */
typedef struct lococo_pool lococo_pool;       /* many sessions by name, a few of them in memory */
typedef struct lococo_batch lococo_batch;     /* sessions that are stepped together */

/* What a call came to; lococo_last_error() has the text. */
typedef enum lococo_status {
  LOCOCO_OK = 0,                     /* done */
  LOCOCO_ERROR_INVALID_ARGUMENT = 1, /* a value the caller can correct: token id out of range, empty prompt, ... */
  LOCOCO_ERROR_NOT_FOUND = 2,        /* a file, folder or library that is not there */
  LOCOCO_ERROR_CORRUPT = 3,          /* truncated, wrong sha256, malformed JSON, inconsistent manifest */
  LOCOCO_ERROR_VERSION = 4,          /* a schema version this library does not know */
  LOCOCO_ERROR_UNSUPPORTED = 5,      /* a device, backend or dtype that is not available here */
  LOCOCO_ERROR_STATE_MISMATCH = 6,   /* a state of another bundle */
  LOCOCO_ERROR_BUSY = 7,           /* the session, or the pool's directory, is in use elsewhere; or it is in a batch */
  LOCOCO_ERROR_DEAD = 8,           /* an earlier backend error left the session unusable: reset or load it */
  LOCOCO_ERROR_IO = 9,             /* the operating system refused a read or a write */
  LOCOCO_ERROR_NO_SPACE = 10,      /* the disk is full */
  LOCOCO_ERROR_OUT_OF_MEMORY = 11, /* memory could not be had */
  LOCOCO_ERROR_BACKEND = 12,       /* ONNX Runtime (or another backend) failed; the message carries its text */
  LOCOCO_ERROR_INTERNAL = 13,      /* a defect of this library */
  LOCOCO_ERROR_POOL_FULL = 14,     /* every session that the pool's budget allows is acquired */
  LOCOCO_ERROR_CANCELLED = 15,     /* lococo_session_cancel stopped it */
} lococo_status;

/* Zero-initialise, set struct_size = sizeof(lococo_options), then what you need. NULL and 0 mean the default. */
typedef struct lococo_options {
  size_t struct_size;  /* sizeof(lococo_options) */
  const char* device;  /* "cpu" (default), or "cuda:0" and on */
  const char* backend; /* "onnxruntime" (default; CUDA needs its GPU build), "tensorrt": engines of lococo-build */
  const char* backend_library; /* onnxruntime: path of libonnxruntime; default: $LOCOCO_ONNXRUNTIME, then the loader's
                                * search path. tensorrt: path of liblococo_trt; default: $LOCOCO_TRT_LIBRARY, then
                                * beside liblococo. The first model that loads ONNX Runtime sets
                                * $ORT_DISABLE_TELEMETRY=1, where it is not set: nothing is collected or sent */
  int32_t num_threads; /* intra-op threads; 0 = one per physical core. The first model decides for the process */
  int32_t skip_hashes; /* 1 = check file sizes only, not their sha256 */
} lococo_options;

/* Geometry and sizes of an opened bundle. */
typedef struct lococo_model_info {
  size_t struct_size;     /* sizeof(lococo_model_info) */
  int32_t vocab_size;     /* V: logits of a token */
  int32_t num_layers;     /* decoder layers */
  int32_t num_kv_heads;   /* heads of K and V a layer */
  int32_t head_dim;       /* d: numbers a head */
  int32_t mem_size;       /* M: slots left by a fusion */
  int32_t capacity;       /* M + buffer: the most slots that are live between calls */
  int32_t block_size;     /* B: the most tokens of one forward */
  int32_t max_batch;      /* sessions that one batch holds, N of --batch N; 1: lococo_batch_create is refused */
  uint64_t state_bytes;   /* bytes of one state: what state_get writes, less its header */
  uint64_t session_bytes; /* all memory a session keeps for itself, buffers for one forward included */
  uint64_t batch_bytes;   /* all memory a batch keeps beside that of its sessions; 0 if it is a loop */
  const char* bundle_id;  /* 64 hex digits */
  const char* dtype;      /* "float32", "float16", "bfloat16" */
} lococo_model_info;

/* How a token is chosen. Zero-initialise, set struct_size, then what you need: all zero is greedy decoding.
 *
 * Applied in this order, transformers' own; every probability is of what the steps before have left:
 *   logit_bias, repetition_penalty, frequency_penalty, presence_penalty, allowed_tokens, temperature, top_k, top_p,
 *   min_p, typical_p.
 * Greedy decoding (temperature 0) takes the largest logit after allowed_tokens, the lowest id on a tie.
 *
 * What the penalties see is part of the session's state, for every id whether it was read and how often it was read
 * since generation began, so that saving, loading, cloning and stepping change nothing:
 *   repetition_penalty    every token read since the session was created or reset, prompts included;
 *   frequency_penalty and presence_penalty    the generated tokens: those read one at a time (step, generate, a prefill
 *                         of one) since the last prompt. A prompt is a prefill of more than one token, or the first
 *                         token of a session; the counts begin anew behind it. */
typedef struct lococo_sampling_params {
  size_t struct_size;        /* sizeof(lococo_sampling_params) */
  double temperature;        /* logits are divided by it; 0 = greedy */
  int32_t top_k;             /* keep the k likeliest and all that tie with the last of them; 0 = all */
  double top_p;              /* keep the likeliest that together reach top_p; 0 or 1 = all */
  uint64_t seed;             /* a draw depends on the probabilities, the seed and the absolute position alone */
  double min_p;              /* drop what is less likely than min_p times the likeliest; 0 = none */
  double typical_p;          /* keep the most typical (arXiv 2202.00666) that together reach typical_p; 0 or 1 = all */
  double repetition_penalty; /* of tokens read: positive logits are divided by it, others multiplied; 0 or 1 = off */
  double presence_penalty;   /* subtracted from the logits of generated tokens */
  double frequency_penalty;  /* subtracted from the logits of generated tokens, times how often each was generated */
  const int32_t* logit_bias_ids;  /* (num_logit_bias) */
  const float* logit_bias_values; /* (num_logit_bias): added to these logits; ids that repeat add up */
  size_t num_logit_bias;          /* ids in the two arrays above */
  const uint32_t* allowed_tokens; /* NULL = all; or a mask: id is allowed if bit id % 32 of word id / 32 is set */
  size_t num_allowed_words;       /* (vocab_size + 31) / 32 with a mask */
  const int32_t* stop_token_ids;  /* (num_stop_token_ids): generate ends after one, beside the end-of-sequence ids */
  size_t num_stop_token_ids;      /* ids in the array above */
  int32_t ignore_eos;             /* 1 = generate does not end after an end-of-sequence token */
} lococo_sampling_params;

/* Zero-initialise, set struct_size, then directory and one of the two sizes. */
typedef struct lococo_pool_options {
  size_t struct_size;    /* sizeof(lococo_pool_options) */
  const char* directory; /* where idle sessions are parked; made if its parent is there. One pool at a time */
  uint64_t budget_bytes; /* memory of all sessions together, session_bytes each, at least one of them */
  uint64_t max_sessions; /* the same as a number of sessions in memory */
} lococo_pool_options;

/* What a pool holds, and what it has done. */
typedef struct lococo_pool_info {
  size_t struct_size;     /* sizeof(lococo_pool_info) */
  uint64_t max_sessions;  /* in memory at once */
  uint64_t session_bytes; /* of memory, each; parking and resuming one takes state_bytes more for its duration */
  uint64_t memory_bytes;  /* taken now: at most max_sessions * session_bytes */
  int64_t num_acquired;   /* sessions handed out */
  int64_t num_idle;       /* the others that are in memory */
  int64_t num_parked;     /* those that are on disk alone */
  int64_t parks;          /* state files written since create */
  int64_t resumes;        /* state files read since create */
} lococo_pool_info;

/* Where a session of a pool is. */
typedef enum lococo_place {
  LOCOCO_PLACE_ACQUIRED = 0, /* handed out */
  LOCOCO_PLACE_MEMORY = 1,   /* idle */
  LOCOCO_PLACE_DISK = 2,     /* parked */
} lococo_place;

/* How a batch steps its sessions. */
typedef enum lococo_batch_implementation {
  LOCOCO_BATCH_GRAPH = 0, /* one forward of a batched graph, which reads the weights once for all */
  LOCOCO_BATCH_LOOP = 1,  /* a forward for each session, as if stepped alone: the backend runs no batched graphs */
} lococo_batch_implementation;

/* How bad a log line is. */
typedef enum lococo_log_level {
  LOCOCO_LOG_INFO = 0,    /* what was opened, and how */
  LOCOCO_LOG_WARNING = 1, /* it goes on, but not as it should */
  LOCOCO_LOG_ERROR = 2,   /* something was not done */
} lococo_log_level;
/* Receives log lines; message lives as long as the call. */
typedef void (*lococo_log_fn)(lococo_log_level level, const char* message, void* user);

/* Called for every generated token, end-of-sequence tokens included; return non-zero to stop. */
typedef int (*lococo_token_fn)(int32_t token_id, void* user);

/* Called for every session of a pool; id is valid during the call; return non-zero to stop. */
typedef int (*lococo_place_fn)(const char* id, lococo_place place, void* user);

/* --- library ----------------------------------------------------------------------------------------------------- */

/* LOCOCO_ABI_VERSION of the library that was loaded. */
LOCOCO_API int32_t lococo_abi_version(void);
/* LOCOCO_VERSION of the library that was loaded; static. */
LOCOCO_API const char* lococo_version(void);
/* The calling thread's last error text, "" if none; valid until that thread's next failing call. */
LOCOCO_API const char* lococo_last_error(void);
/* One callback for the process; NULL silences (the default). May be called from any thread that calls in. */
LOCOCO_API void lococo_set_log_callback(lococo_log_fn fn, void* user);

/* --- model ------------------------------------------------------------------------------------------------------- */

/* Opens and checks a bundle directory. options may be NULL. */
LOCOCO_API lococo_status lococo_model_open(const char* bundle_dir, const lococo_options* options, lococo_model** out);
/* Frees the model; its sessions must be gone. */
LOCOCO_API void lococo_model_close(lococo_model* model);
/* Set info->struct_size first. Strings live as long as the model. */
LOCOCO_API lococo_status lococo_model_get_info(const lococo_model* model, lococo_model_info* info);

/* --- session ----------------------------------------------------------------------------------------------------- */

/* A new session with an empty cache. */
LOCOCO_API lococo_status lococo_session_create(lococo_model* model, lococo_session** out);
/* Frees the session; one that another thread is using is left alone, and a log line says so. */
LOCOCO_API void lococo_session_destroy(lococo_session* session);
/* Back to an empty cache at position 0; revives a dead session. */
LOCOCO_API lococo_status lococo_session_reset(lococo_session* session);
/* A second session of the same model in the same state. */
LOCOCO_API lococo_status lococo_session_clone(lococo_session* session, lococo_session** out);

/* Reads ids[0..n), n >= 1, in forwards of at most block_size tokens from the current position on.
 * all_logits: NULL, or room for n * vocab_size floats, row-major (n, vocab_size). All ids are checked first. */
LOCOCO_API lococo_status lococo_session_prefill(lococo_session* session, const int32_t* ids, size_t n,
                                                float* all_logits);
/* Reads one token in a forward of one. */
LOCOCO_API lococo_status lococo_session_step(lococo_session* session, int32_t id);
/* The logits after the last token read, (vocab_size) floats; refused on an empty session. */
LOCOCO_API lococo_status lococo_session_logits(lococo_session* session, const float** logits);
/* Chooses a token from the current logits; changes nothing. params NULL = greedy. */
LOCOCO_API lococo_status lococo_session_sample(lococo_session* session, const lococo_sampling_params* params,
                                               int32_t* id);
/* What sample draws from: probabilities: room for (vocab_size) floats, which sum to 1. Greedy: 1 at one id. */
LOCOCO_API lococo_status lococo_session_distribution(lococo_session* session, const lococo_sampling_params* params,
                                                     float* probabilities);
/* Natural logarithms of the model's own probabilities, the softmax of the current logits before any parameter: of `id`,
 * and of the n likeliest ids, likeliest first, the lower id on a tie. Call it between sample and step.
 * top_ids, top_logprobs: room for n each, NULL if n is 0. */
LOCOCO_API lococo_status lococo_session_logprobs(lococo_session* session, int32_t id, int32_t n, float* logprob,
                                                 int32_t* top_ids, float* top_logprobs);
/* Samples and steps until max_tokens tokens, an end-of-sequence or stop token, or a non-zero return of on_token (may be
 * NULL). The last token sampled has not been read yet: step it or prefill it with the next text. allowed_tokens stays
 * the same for all of them; a grammar, whose mask changes with every token, samples and steps. num_generated may be
 * NULL. */
LOCOCO_API lococo_status lococo_session_generate(lococo_session* session, const lococo_sampling_params* params,
                                                 int32_t max_tokens, lococo_token_fn on_token, void* user,
                                                 int32_t* num_generated);
/* From any thread, at any time, without waiting: while cancel is 1, prefill, step and generate, running or yet to come,
 * end before their next forward with LOCOCO_ERROR_CANCELLED. What has been read stays read (position says how much);
 * after cancel 0 the session goes on from there. */
LOCOCO_API lococo_status lococo_session_cancel(lococo_session* session, int32_t cancel);
/* Tokens read so far, P. */
LOCOCO_API lococo_status lococo_session_position(lococo_session* session, int64_t* position);
/* Slots in use now, at most capacity. */
LOCOCO_API lococo_status lococo_session_live_slots(lococo_session* session, int32_t* live_slots);
/* Greedy decoding from one fusion to the next that the device ran in one go, since create, reset or load: how often,
 * and the seconds, by its own clock, that it waited for the host between windows that followed each other. 0 on a CPU.
 * Either pointer may be NULL. */
LOCOCO_API lococo_status lococo_session_windows(lococo_session* session, int64_t* windows, double* idle_seconds);
/* Forwards of one token and of more, and fusions, since create, reset or load. Any pointer may be NULL. */
LOCOCO_API lococo_status lococo_session_counters(lococo_session* session, int64_t* steps, int64_t* blocks,
                                                 int64_t* fusions);

/* --- stop strings ------------------------------------------------------------------------------------------------ */

/* Ends a text at the first of some strings, however the text is cut into pieces. Texts are compared byte by byte.
 * What could still become a stop string is held back until that is decided, and nothing else is. */

#define LOCOCO_MAX_STOPS 64        /* strings of one list */
#define LOCOCO_MAX_STOP_BYTES 1024 /* bytes of one string */

/* strings: (n) NUL-terminated UTF-8, none of them empty. */
LOCOCO_API lococo_status lococo_stops_create(const char* const* strings, size_t n, lococo_stops** out);
/* Frees the strings and the text. */
LOCOCO_API void lococo_stops_destroy(lococo_stops* stops);
/* Takes the next piece of the text and gives what may be shown now: out (out_size bytes, not NUL-terminated, valid
 * until the next call on stops). matched: the index of the stop string that is complete now, or -1. The one that is
 * complete first ends the text, of several that end together the longest; nothing of it or after it comes out. Refused
 * after a match until reset. */
LOCOCO_API lococo_status lococo_stops_push(lococo_stops* stops, const char* text, size_t size, const char** out,
                                           size_t* out_size, int32_t* matched);
/* The text ends without a match: gives what was held back, and begins anew. */
LOCOCO_API lococo_status lococo_stops_finish(lococo_stops* stops, const char** out, size_t* out_size);
/* Forgets the text; the strings stay. */
LOCOCO_API lococo_status lococo_stops_reset(lococo_stops* stops);

/* --- batches: sessions stepped together -------------------------------------------------------------------------- */

/* A bundle exported with --batch N (lococo_model_info.max_batch) steps up to N sessions in one forward, which reads the
 * weights once for all of them. Sessions join and leave at any time and stand wherever they stand. While a session is
 * in a batch, everything that only looks at it works as ever: logits, sample, position, state_get, save, clone. What
 * would change it (prefill, step, generate, reset, state_set, load) is refused with LOCOCO_ERROR_BUSY.
 * A session's numbers depend neither on its place in the batch nor on the other sessions; beside those of
 * lococo_session_step they differ by rounding. A cancelled session is not stepped: the call is refused. A batch belongs
 * to one thread at a time, as a session does; other threads may look at sessions that a step leaves out.
 * Backend "tensorrt" has no batched engines. There a batch is a loop (lococo_batch_get_implementation): the same calls
 * give the same tokens, bit for bit those of lococo_session_step; each session takes a forward of its own, and all are
 * started before the first is waited for. */

/* LOCOCO_ERROR_UNSUPPORTED: max_batch is 1. A line in the log says so where the batch is a loop. */
LOCOCO_API lococo_status lococo_batch_create(lococo_model* model, lococo_batch** out);
/* The sessions in it go on alone. Nothing happens, but for a line in the log, while one of them is in use. */
LOCOCO_API void lococo_batch_destroy(lococo_batch* batch);
/* The session joins; a batched graph gets a copy of its state. Refused if max_batch sessions are in it, or if the
 * session is in a batch. A session that is destroyed leaves its batch. */
LOCOCO_API lococo_status lococo_batch_add(lococo_batch* batch, lococo_session* session);
/* The session goes on alone, with its state. */
LOCOCO_API lococo_status lococo_batch_remove(lococo_batch* batch, lococo_session* session);
/* Reads ids[i] in sessions[i], i < n: some or all sessions of the batch, each at most once; the others rest. Everything
 * is checked before any of them reads. After LOCOCO_ERROR_BACKEND each has either read its token or stands where it
 * stood, as lococo_session_position says, or, in a loop alone, is dead; after any other error none has read. */
LOCOCO_API lococo_status lococo_batch_step(lococo_batch* batch, lococo_session* const* sessions, const int32_t* ids,
                                           size_t n);
/* Whether a step is one forward for all sessions or one for each. */
LOCOCO_API lococo_status lococo_batch_get_implementation(const lococo_batch* batch,
                                                         lococo_batch_implementation* implementation);

/* --- state: constant size, at any position ------------------------------------------------------------------------ */

/* Bytes that state_get writes and a state file holds: header and state_bytes. */
LOCOCO_API lococo_status lococo_session_state_size(lococo_session* session, size_t* size);
/* Writes the state to buffer; size must be that of lococo_session_state_size. */
LOCOCO_API lococo_status lococo_session_state_get(lococo_session* session, void* buffer, size_t size);
/* Continues from a state, checked whole (magic, schema version, bundle, size, checksum, lengths) before anything
 * changes. */
LOCOCO_API lococo_status lococo_session_state_set(lococo_session* session, const void* buffer, size_t size);
/* Saves the state as a file: written beside path, fsynced, renamed: path holds the old file or the new one, never half
 * of one. */
LOCOCO_API lococo_status lococo_session_save(lococo_session* session, const char* path);
/* Continues from a state file, checked as by state_set. */
LOCOCO_API lococo_status lococo_session_load(lococo_session* session, const char* path);

/* --- pool: many sessions, a few in memory, the others parked as state files -------------------------------------- */

/* Opens a pool on a directory. The sessions that an earlier pool parked there are there again, also after a crash. The
 * model may be closed while the pool is open. LOCOCO_ERROR_BUSY: another pool, of any process, has the directory. */
LOCOCO_API lococo_status lococo_pool_create(lococo_model* model, const lococo_pool_options* options, lococo_pool** out);
/* Forgets what is in memory and was neither parked nor flushed. Logged and ignored while a session is acquired. */
LOCOCO_API void lococo_pool_destroy(lococo_pool* pool);
/* The session of this id as it was released last, from memory or from its state file. A new id starts empty or, if
 * `start` is not NULL, from that state file; an id that the pool knows does not read it. When the budget is used up,
 * the least recently used idle session is parked, and its buffers serve this one.
 *   id          1 to 200 bytes, where each byte but a-z 0-9 - _ . counts as three
 *   timeout_ms  how long to wait for another thread to release this session (then LOCOCO_ERROR_BUSY), or any if all of
 *               the budget is acquired (then LOCOCO_ERROR_POOL_FULL); 0: not at all; negative: for ever
 * On an error the session is not acquired and nothing is lost: another one that cannot be parked
 * (LOCOCO_ERROR_NO_SPACE, LOCOCO_ERROR_IO) stays in memory; a state file that is damaged, or of another schema or
 * bundle, stays where it is until lococo_pool_remove. */
LOCOCO_API lococo_status lococo_pool_acquire(lococo_pool* pool, const char* id, const char* start, int32_t timeout_ms,
                                             lococo_session** out);
/* Gives a session back; the handle is gone then. A dead session is dropped: its last state file is what stays.
 * LOCOCO_ERROR_BUSY: another thread is inside a call, or it is in a batch; it stays acquired. */
LOCOCO_API lococo_status lococo_pool_release(lococo_pool* pool, lococo_session* session);
/* Writes an idle session (id NULL: all) to disk where it is newer than its state file. It stays in memory. */
LOCOCO_API lococo_status lococo_pool_flush(lococo_pool* pool, const char* id);
/* Deletes an idle session and its state file. */
LOCOCO_API lococo_status lococo_pool_remove(lococo_pool* pool, const char* id);
/* Where a session is; LOCOCO_ERROR_NOT_FOUND if the pool does not know it. */
LOCOCO_API lococo_status lococo_pool_find(lococo_pool* pool, const char* id, lococo_place* place);
/* The sessions as they are at the call, least recently used first. */
LOCOCO_API lococo_status lococo_pool_list(lococo_pool* pool, lococo_place_fn fn, void* user);
/* Set info->struct_size first. */
LOCOCO_API lococo_status lococo_pool_get_info(lococo_pool* pool, lococo_pool_info* info);

#ifdef __cplusplus
}
#endif
#endif
