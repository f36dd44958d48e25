// The TensorRT backend as far as it goes without a GPU: the driver's answers, which engines fit, where tensors lie, and
// windows of greedy decoding and batches, on a stand-in for the driver and for liblococo_trt ($FAKE_TRT_MODULE).
#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backend.h"
#include "check.h"
#include "error.h"
#include "lococo.h"
#include "manifest.h"
#include "session.h"
#include "trt/engines.h"
#include "trt/layout.h"

namespace {

using namespace lococo;

constexpr const char* kPlanHeader = "ptrt\0\0\0\0----------------\x0a\x03\x00\x1a";  // of TensorRT 10.3.0.26

std::string plan_text(const std::string& name) { return std::string(kPlanHeader, 28) + name; }

std::string sha256_hex(const std::string& text) {
  Sha256 sha;
  sha.update(text.data(), text.size());
  return to_hex(sha.digest());
}

struct EnginesText {
  std::string bundle_id, flavour = "tensorrt", version = "10.3.0", plan_version = "10.3.0.26", sm = "[90]";
  std::string num_layers = "null", hardware = "none", compatible = "false", onnx_sha256;
  std::string weights = "[]", weights_bytes = "0", format = "lococo-engines", schema = "1";
  std::vector<std::string> plans = {"decoder_1", "fusion_1", "decoder_3", "fusion_3", "lm_head_3"};

  [[nodiscard]] std::string json() const {
    std::string list;
    for (const std::string& name : plans) {
      const size_t underscore = name.rfind('_');
      const std::string onnx = name + ".onnx";
      list += std::string(list.empty() ? "" : ",") + "{\"name\":\"" + name + "\",\"kind\":\"" +
              name.substr(0, underscore) + "\",\"tokens\":" + name.substr(underscore + 1) + ",\"plan\":\"" + name +
              ".plan\",\"nbytes\":" + std::to_string(plan_text(name).size()) + ",\"sha256\":\"" +
              sha256_hex(plan_text(name)) + "\",\"onnx\":\"" + onnx + "\",\"onnx_sha256\":\"" +
              (onnx_sha256.empty() ? sha256_hex(onnx) : onnx_sha256) +
              "\",\"workspace_bytes\":null,\"weights\":" + (name == "decoder_1" ? weights : "[]") + "}";
    }
    return "{\"format\":\"" + format + "\",\"schema_version\":" + schema + ",\"bundle_id\":\"" + bundle_id +
           "\",\"flavour\":\"" + flavour + "\",\"tensorrt_version\":\"" + version + "\",\"plan_version\":\"" +
           plan_version + "\",\"sm\":" + sm + ",\"options\":{\"num_layers\":" + num_layers +
           ",\"hardware_compatibility_level\":\"" + hardware + "\",\"version_compatible\":" + compatible +
           "},\"weights_offset\":0,\"weights_bytes\":" + weights_bytes + ",\"plans\":[" + list + "]}";
  }
};

// The bundle of data/lococo.json with its files, which hold their own names.
class Bundle {
 public:
  Bundle() : manifest(read_manifest("data")) {
    std::filesystem::copy("data/lococo.json", dir / "lococo.json");
    std::filesystem::create_directories(dir / "tokenizer");
    for (const FileEntry& f : manifest.files) write_text(dir / f.path, f.path);
    manifest = read_manifest(dir.path());
    text.bundle_id = manifest.bundle_id;
  }
  // Writes engines/key; returns its directory.
  std::string engines(const std::string& key, const EnginesText& e) const {
    const std::string directory = dir / ("engines/" + key);
    std::filesystem::create_directories(directory);
    write_text(directory + "/engines.json", e.json());
    for (const std::string& name : e.plans) write_text(directory + "/" + name + ".plan", plan_text(name));
    return directory;
  }
  void clear() const { std::filesystem::remove_all(dir / "engines"); }

  TempDir dir;
  Manifest manifest;
  EnginesText text;
};

void choosing() {
  const Bundle b;
  const trt::Target here = {"10.3.0", 90, "cuda:0 (Fake GPU)"};
  CHECK_ERROR(LOCOCO_ERROR_NOT_FOUND, ("found none", "10.3.0", "Fake GPU", "lococo-build"),
              trt::choose_engines(b.manifest, here));

  const auto refused = [&](lococo_status status, const char* part, const std::function<void(EnginesText&)>& change) {
    EnginesText e = b.text;
    change(e);
    b.engines("one", e);
    CHECK_ERROR(status, ("engines/one", part), trt::choose_engines(b.manifest, here));
  };
  refused(LOCOCO_ERROR_CORRUPT, "lococo-engines", [](EnginesText& e) { e.format = "something"; });
  refused(LOCOCO_ERROR_VERSION, "schema_version", [](EnginesText& e) { e.schema = "2"; });
  refused(LOCOCO_ERROR_CORRUPT, "built for bundle", [](EnginesText& e) { e.bundle_id = std::string(64, 'a'); });
  refused(LOCOCO_ERROR_VERSION, "tensorrt_rtx", [](EnginesText& e) { e.flavour = "tensorrt_rtx"; });
  refused(LOCOCO_ERROR_VERSION, "built with TensorRT 8.6.1", [](EnginesText& e) { e.version = "8.6.1"; });
  refused(LOCOCO_ERROR_VERSION, "built with TensorRT 10.3.1", [](EnginesText& e) {
    e.version = "10.3.1";  // newer than what is here
    e.compatible = "true";
  });
  refused(LOCOCO_ERROR_UNSUPPORTED, "built for sm87, sm110", [](EnginesText& e) { e.sm = "[87, 110]"; });
  refused(LOCOCO_ERROR_UNSUPPORTED, "--num-layers 2", [](EnginesText& e) { e.num_layers = "2"; });
  refused(LOCOCO_ERROR_CORRUPT, "another version of decoder_1.onnx",
          [](EnginesText& e) { e.onnx_sha256 = std::string(64, '0'); });
  refused(LOCOCO_ERROR_CORRUPT, "of 3 tokens", [](EnginesText& e) { e.plans = {"decoder_1", "fusion_1"}; });
  refused(LOCOCO_ERROR_CORRUPT, "contradict", [](EnginesText& e) {
    e.weights = R"([{"name":"w","shape":[2,2],"dtype":"float16","offset":0,"nbytes":8}])";
    e.weights_bytes = "7";
  });
  refused(LOCOCO_ERROR_CORRUPT, "contradict", [](EnginesText& e) {
    e.weights = R"([{"name":"w","shape":[2,2],"dtype":"float16","offset":4,"nbytes":8}])";
    e.weights_bytes = "512";
  });

  // several: those that fit exactly win, and a build in progress is not looked at
  b.clear();
  EnginesText e = b.text;
  e.version = "8.6.0";
  b.engines("a", e);
  e = b.text;
  e.sm = "[80]";
  e.hardware = "ampere+";
  b.engines("b", e);
  CHECK_EQ(trt::choose_engines(b.manifest, here).directory, b.dir / "engines/b");
  b.engines("c", b.text);
  b.engines(".d", b.text);
  const trt::Engines chosen = trt::choose_engines(b.manifest, here);
  CHECK_EQ(chosen.directory, b.dir / "engines/c");
  CHECK_EQ(chosen.plans.size(), 5u);
  CHECK(chosen.widths == std::vector<int32_t>({1, 3}));
  CHECK(chosen.has_lm_head);
  CHECK_ERROR(LOCOCO_ERROR_UNSUPPORTED, ("engines/a", "engines/b", "engines/c"),
              trt::choose_engines(b.manifest, {"10.3.0", 87, "cuda:0 (Orin)"}));

  // plans
  const trt::Plan& plan = chosen.plans[0];
  const auto check = [&] { trt::check_plan(chosen, plan, trt::MappedFile(plan.path), false); };
  check();
  std::string text = plan_text("decoder_1");
  write_text(plan.path, text.substr(0, text.size() - 1));
  CHECK_ERROR(LOCOCO_ERROR_CORRUPT, ("decoder_1.plan", "cut short"), check());
  text.back() ^= 1;
  write_text(plan.path, text);
  CHECK_ERROR(LOCOCO_ERROR_CORRUPT, ("decoder_1.plan", "sha256"), check());
  text[24] = 8;
  write_text(plan.path, text);
  CHECK_ERROR(LOCOCO_ERROR_VERSION, ("decoder_1.plan", "10.3.0.26", "8.3.0.26"), check());
  trt::Engines forged = chosen;
  forged.tensorrt_version = "8.6.0";
  write_text(plan.path, plan_text("decoder_1"));
  CHECK_ERROR(LOCOCO_ERROR_VERSION, ("its header says TensorRT 10.3.0.26", "8.6.0"),
              trt::check_plan(forged, plan, trt::MappedFile(plan.path), false));
  std::filesystem::remove(plan.path);
  CHECK_ERROR(LOCOCO_ERROR_NOT_FOUND, ("decoder_1.plan"), check());
  CHECK_EQ(trt::plan_version(nullptr, 0), "");
}

// No two tensors overlap, all are aligned, and a fusion's result lies as the state does.
void layout() {
  const Manifest m = read_manifest("data");
  const lococo_module_layout l = trt::make_layout(m);
  for (const GraphSpec& g : m.graphs) {
    std::vector<std::pair<uint64_t, uint64_t>> spans;
    for (const auto* list : {&g.inputs, &g.outputs}) {
      for (const TensorSpec& t : *list) {
        const uint64_t offset = trt::offset_of(l, g.kind, t);
        if (offset == LOCOCO_MODULE_NO_OFFSET) continue;
        CHECK_EQ(offset % 256, 0u);
        spans.emplace_back(offset, offset + t.nbytes());
        if (t.name.rfind("present", 0) != 0) continue;
        TensorSpec past = t;
        past.name.replace(0, 7, t.name[7] == '.' ? "past_key_values" : "past");
        CHECK_EQ(offset - l.fused, trt::offset_of(l, g.kind, past) - l.cache);
      }
    }
    std::sort(spans.begin(), spans.end());
    for (size_t i = 1; i < spans.size(); ++i) CHECK(spans[i - 1].second <= spans[i].first);
    CHECK(spans.back().second <= l.arena_bytes);
  }
  CHECK(l.inputs_bytes <= l.ring && l.chooser + 32 <= l.inputs + l.inputs_bytes);
  CHECK(l.state + l.state_bytes <= l.fused && l.fused + l.cache_bytes <= l.saved_logits);
  CHECK_ERROR(LOCOCO_ERROR_INTERNAL, ("strange"),
              trt::offset_of(l, GraphKind::kDecoder, {"strange", {1}, Dtype::kInt32}));
}

lococo_options options() {
  lococo_options o{};
  o.struct_size = sizeof o;
  o.device = "cuda:0";
  o.backend = "tensorrt";
  o.backend_library = std::getenv("FAKE_TRT_MODULE");
  return o;
}

void opening(const Bundle& b) {
  lococo_model* model = nullptr;
  lococo_options o = options();
  const auto refused = [&](lococo_status status, const char* part) {
    CHECK_EQ(lococo_model_open(b.dir.path().c_str(), &o, &model), status);
    const std::string text = lococo_last_error();
    check(text.find(part) != std::string::npos, __FILE__, __LINE__,
          "expected \"" + std::string(part) + "\" in " + text);
  };
  const auto faked = [&](const char* variable, const char* value, lococo_status status, const char* part) {
    setenv(variable, value, 1);
    refused(status, part);
    unsetenv(variable);
  };
  faked("FAKE_CUDA", "no device", LOCOCO_ERROR_UNSUPPORTED, "sees no GPU");
  faked("FAKE_CUDA", "broken", LOCOCO_ERROR_UNSUPPORTED, "CUDA_ERROR_UNKNOWN");
  faked("FAKE_CUDA", "old driver", LOCOCO_ERROR_UNSUPPORTED, "found one for CUDA 11.4");
  faked("FAKE_TRT", "other ABI", LOCOCO_ERROR_VERSION, "another ABI");
  faked("FAKE_TRT", "other version", LOCOCO_ERROR_VERSION, "another TensorRT");
  faked("FAKE_TRT", "no memory", LOCOCO_ERROR_OUT_OF_MEMORY, "device memory");
  for (const char* device : {"cpu", "cuda", "cuda:", "cuda:x", "cuda:-1", "cuda:0001"}) {
    o.device = device;
    refused(LOCOCO_ERROR_UNSUPPORTED, device);
  }
  o.device = "cuda:1";
  refused(LOCOCO_ERROR_UNSUPPORTED, "cuda:1");
  o = options();
  o.backend_library = "/nowhere/liblococo_trt.so";
  refused(LOCOCO_ERROR_NOT_FOUND, "/nowhere/liblococo_trt.so");
  o.backend_library = "libm.so.6";
  refused(LOCOCO_ERROR_VERSION, "another library");
  o = options();
  o.backend = "onnxruntime";
  faked("FAKE_CUDA", "no device", LOCOCO_ERROR_UNSUPPORTED, "sees no GPU");
  o.backend_library = "libm.so.6";
  refused(LOCOCO_ERROR_UNSUPPORTED, "libm.so.6");
  if (std::getenv("LOCOCO_ONNXRUNTIME") != nullptr) {
    o.backend_library = nullptr;
    refused(LOCOCO_ERROR_UNSUPPORTED, "CUDAExecutionProvider");
  }
  o.device = "cuda";
  refused(LOCOCO_ERROR_UNSUPPORTED, "\"cpu\", \"cuda:0\"");
  CHECK(model == nullptr);
}

// Tokens, then the state.
struct Outcome {
  std::vector<int32_t> ids;
  std::vector<uint8_t> state;
  bool operator==(const Outcome& other) const { return ids == other.ids && state == other.state; }
};

struct Stop {  // after the token of this index
  int32_t at;
  std::vector<int32_t> ids;
};

Outcome outcome(lococo_session* s, std::vector<int32_t> ids) {
  size_t size = 0;
  CHECK_EQ(lococo_session_state_size(s, &size), LOCOCO_OK);
  Outcome out{std::move(ids), std::vector<uint8_t>(size)};
  CHECK_EQ(lococo_session_state_get(s, out.state.data(), size), LOCOCO_OK);
  return out;
}

// By generate, which may use windows.
Outcome generated(lococo_session* s, const lococo_sampling_params& params, int32_t max_tokens, int32_t stop_at) {
  Stop stop{stop_at, {}};
  int32_t count = 0;
  const auto on_token = [](int32_t id, void* user) {
    auto* stop = static_cast<Stop*>(user);
    stop->ids.push_back(id);
    return stop->at == static_cast<int32_t>(stop->ids.size()) - 1 ? 1 : 0;
  };
  CHECK_EQ(lococo_session_generate(s, &params, max_tokens, on_token, &stop, &count), LOCOCO_OK);
  CHECK_EQ(count, static_cast<int32_t>(stop.ids.size()));
  return outcome(s, stop.ids);
}

// The same by single steps.
Outcome stepped(lococo_session* s, const lococo_sampling_params& params, int32_t max_tokens, int32_t stop_at,
                const std::vector<int32_t>& ends) {
  std::vector<int32_t> ids;
  while (static_cast<int32_t>(ids.size()) < max_tokens) {
    int32_t id = -1;
    CHECK_EQ(lococo_session_sample(s, &params, &id), LOCOCO_OK);
    ids.push_back(id);
    const auto count = static_cast<int32_t>(ids.size());
    if (count == max_tokens || count - 1 == stop_at || std::find(ends.begin(), ends.end(), id) != ends.end()) break;
    CHECK_EQ(lococo_session_step(s, id), LOCOCO_OK);
  }
  return outcome(s, ids);
}

// Windows change nothing but the number of launches: not the tokens, the state, the counters, wherever they begin or
// are cut short.
void windows(const Bundle& b) {
  lococo_model* model = nullptr;
  const lococo_options o = options();
  CHECK_EQ(lococo_model_open(b.dir.path().c_str(), &o, &model), LOCOCO_OK);
  if (model == nullptr) {
    std::fprintf(stderr, "%s\n", lococo_last_error());
    return;
  }
  lococo_session* a = nullptr;
  lococo_session* c = nullptr;
  CHECK_EQ(lococo_session_create(model, &a), LOCOCO_OK);
  CHECK_EQ(lococo_session_create(model, &c), LOCOCO_OK);
  const int32_t window = trt::window_tokens(b.manifest);
  int32_t longest = 0;
  // Greedy; with another end, without one, and with penalties, which no window can apply.
  std::vector<lococo_sampling_params> kinds(4);
  std::vector<std::vector<int32_t>> ends(4, b.manifest.eos_token_ids);
  const int32_t stop_id = 1;
  for (auto& params : kinds) params.struct_size = sizeof params;
  kinds[1].stop_token_ids = &stop_id;
  kinds[1].num_stop_token_ids = 1;
  ends[1].push_back(stop_id);
  kinds[2].ignore_eos = 1;
  ends[2].clear();
  kinds[3].repetition_penalty = 1.5;
  kinds[3].frequency_penalty = 7;
  for (int32_t prompt = 1; prompt < 12; ++prompt) {
    for (int32_t seed = 0; seed < 8; ++seed) {
      std::vector<int32_t> ids;
      for (int32_t i = 0; i < prompt; ++i) ids.push_back((7 * i + seed) % b.manifest.vocab_size);
      for (const int32_t max_tokens : {0, 1, window, window + 1, window + 2, 3 * window + 1, 40}) {
        for (const int32_t stop_at : {-1, 0, 1, window - 1, window, window + 1, 2 * window}) {
          for (lococo_session* s : {a, c}) {
            CHECK_EQ(lococo_session_reset(s), LOCOCO_OK);
            CHECK_EQ(lococo_session_prefill(s, ids.data(), ids.size(), nullptr), LOCOCO_OK);
          }
          const auto kind = static_cast<size_t>(seed) % kinds.size();
          const Outcome got = generated(a, kinds[kind], max_tokens, stop_at);
          CHECK(got == stepped(c, kinds[kind], max_tokens, stop_at, ends[kind]));
          int64_t counts[2][3];
          CHECK_EQ(lococo_session_counters(a, &counts[0][0], &counts[0][1], &counts[0][2]), LOCOCO_OK);
          CHECK_EQ(lococo_session_counters(c, &counts[1][0], &counts[1][1], &counts[1][2]), LOCOCO_OK);
          CHECK(std::equal(counts[0], counts[0] + 3, counts[1]));
          int64_t in_one_go = -1;
          double idle = -1.0;
          CHECK_EQ(lococo_session_windows(a, &in_one_go, &idle), LOCOCO_OK);
          CHECK(in_one_go <= counts[0][2] + 1);  // every one but the last ended in a fusion
          CHECK(idle == 0.5 * static_cast<double>(in_one_go));
          CHECK_EQ(lococo_session_windows(c, &in_one_go, nullptr), LOCOCO_OK);
          CHECK_EQ(in_one_go, 0);
          longest = std::max(longest, static_cast<int32_t>(got.ids.size()));
        }
      }
    }
  }
  CHECK(longest > 2 * window);  // end-of-sequence tokens left some windows whole

  setenv("FAKE_TRT", "dying", 1);
  CHECK_EQ(lococo_session_step(a, 1), LOCOCO_ERROR_BACKEND);
  CHECK(std::string(lococo_last_error()).find("CUDA") != std::string::npos);
  unsetenv("FAKE_TRT");
  CHECK_EQ(lococo_session_step(a, 1), LOCOCO_ERROR_DEAD);
  CHECK_EQ(lococo_session_reset(a), LOCOCO_OK);
  CHECK_EQ(lococo_session_step(a, 1), LOCOCO_OK);
  const std::vector<uint8_t> whole = outcome(a, {}).state;
  for (const bool resets : {false, true}) {  // half of a state is no state
    setenv("FAKE_TRT", "dying", 1);
    CHECK_EQ(resets ? lococo_session_reset(a) : lococo_session_state_set(a, whole.data(), whole.size()),
             LOCOCO_ERROR_BACKEND);
    unsetenv("FAKE_TRT");
    CHECK_EQ(lococo_session_step(a, 1), LOCOCO_ERROR_DEAD);
    CHECK_EQ(lococo_session_state_set(a, whole.data(), whole.size()), LOCOCO_OK);
    CHECK(outcome(a, {}).state == whole);
  }
  lococo_session* clone = nullptr;
  CHECK_EQ(lococo_session_clone(a, &clone), LOCOCO_OK);
  CHECK(outcome(clone, {}) == outcome(a, {}));
  std::vector<float> all(3 * static_cast<size_t>(b.manifest.vocab_size));
  const int32_t three[] = {1, 2, 3};
  CHECK_EQ(lococo_session_prefill(a, three, 3, all.data()), LOCOCO_OK);
  for (lococo_session* s : {a, c, clone}) lococo_session_destroy(s);
  lococo_model_close(model);
}

// A cancel inside a window leaves what was read before it, as between single steps; alone the token that was shown is
// not read.
void cancelling(const Bundle& b) {
  lococo_model* model = nullptr;
  const lococo_options o = options();
  CHECK_EQ(lococo_model_open(b.dir.path().c_str(), &o, &model), LOCOCO_OK);
  if (model == nullptr) return;
  struct Cancel {
    lococo_session* session;
    int32_t at;
    std::vector<int32_t> ids;
  };
  const auto on_token = [](int32_t id, void* user) {
    auto* cancel = static_cast<Cancel*>(user);
    cancel->ids.push_back(id);
    if (static_cast<int32_t>(cancel->ids.size()) == cancel->at) lococo_session_cancel(cancel->session, 1);
    return 0;
  };
  const int32_t window = trt::window_tokens(b.manifest);
  lococo_sampling_params params{};
  params.struct_size = sizeof params;
  params.ignore_eos = 1;
  for (int32_t at = 1; at < 4 * window; ++at) {
    Cancel cancel{nullptr, at, {}};
    lococo_session* plain = nullptr;
    for (lococo_session** s : {&cancel.session, &plain}) {
      CHECK_EQ(lococo_session_create(model, s), LOCOCO_OK);
      CHECK_EQ(lococo_session_step(*s, 3), LOCOCO_OK);
    }
    CHECK_EQ(lococo_session_generate(cancel.session, &params, 100, on_token, &cancel, nullptr), LOCOCO_ERROR_CANCELLED);
    CHECK_EQ(static_cast<int32_t>(cancel.ids.size()), at);
    CHECK_EQ(lococo_session_cancel(cancel.session, 0), LOCOCO_OK);
    for (int32_t i = 0; i + 1 < at; ++i)
      CHECK_EQ(lococo_session_step(plain, cancel.ids[static_cast<size_t>(i)]), LOCOCO_OK);
    CHECK(outcome(cancel.session, {}) == outcome(plain, {}));
    lococo_session_destroy(cancel.session);
    lococo_session_destroy(plain);
  }
  lococo_model_close(model);
}

// A batch is a loop: sessions that join and leave at any step have the bits of twins that run alone, and a forward that
// fails takes one session with it.
void batches(const Bundle& b) {
  lococo_model* model = nullptr;
  const lococo_options o = options();
  CHECK_EQ(lococo_model_open(b.dir.path().c_str(), &o, &model), LOCOCO_OK);
  if (model == nullptr) return;
  lococo_model_info info{};
  info.struct_size = sizeof info;
  CHECK_EQ(lococo_model_get_info(model, &info), LOCOCO_OK);
  CHECK_EQ(info.max_batch, 2);
  CHECK_EQ(info.batch_bytes, 0u);
  std::vector<std::string> lines;
  const auto keep = [](lococo_log_level level, const char* text, void* user) {
    if (level == LOCOCO_LOG_WARNING) static_cast<std::vector<std::string>*>(user)->emplace_back(text);
  };
  lococo_set_log_callback(keep, &lines);
  lococo_batch* batch = nullptr;
  CHECK_EQ(lococo_batch_create(model, &batch), LOCOCO_OK);
  lococo_set_log_callback(nullptr, nullptr);
  CHECK(lines.size() == 1 && lines[0].find("forward of its own") != std::string::npos);
  lococo_batch_implementation implementation = LOCOCO_BATCH_GRAPH;
  CHECK_EQ(lococo_batch_get_implementation(batch, &implementation), LOCOCO_OK);
  CHECK_EQ(implementation, LOCOCO_BATCH_LOOP);

  constexpr size_t kSessions = 3;
  lococo_session* together[kSessions];
  lococo_session* alone[kSessions];
  std::vector<int32_t> prompt;
  for (size_t i = 0; i < kSessions; ++i) {
    CHECK_EQ(lococo_session_create(model, &together[i]), LOCOCO_OK);
    prompt.resize(3 * i + 1, static_cast<int32_t>(i) + 2);
    CHECK_EQ(lococo_session_prefill(together[i], prompt.data(), prompt.size(), nullptr), LOCOCO_OK);
    CHECK_EQ(lococo_session_clone(together[i], &alone[i]), LOCOCO_OK);
  }
  bool joined[kSessions] = {};
  uint32_t random = 1;
  const auto chance = [&] { return (random = random * 1664525u + 1013904223u) >> 30 == 0; };
  int32_t shared = 0;
  for (int32_t round = 0; round < 500; ++round) {
    for (size_t i = 0; i < kSessions; ++i) {
      if (!chance()) continue;
      const bool full = std::count(joined, joined + kSessions, true) == info.max_batch;
      if (joined[i]) {
        CHECK_EQ(lococo_batch_remove(batch, together[i]), LOCOCO_OK);
      } else {
        CHECK_EQ(lococo_batch_add(batch, together[i]), full ? LOCOCO_ERROR_INVALID_ARGUMENT : LOCOCO_OK);
      }
      joined[i] = !joined[i] && !full;
    }
    std::vector<lococo_session*> sessions;
    std::vector<int32_t> ids;
    for (size_t i = 0; i < kSessions; ++i) {
      if (!joined[i] || chance()) continue;
      sessions.push_back(together[i]);
      CHECK_EQ(lococo_session_sample(together[i], nullptr, &ids.emplace_back()), LOCOCO_OK);
      CHECK_EQ(lococo_session_step(together[i], 1), LOCOCO_ERROR_BUSY);
      CHECK_EQ(lococo_session_step(alone[i], ids.back()), LOCOCO_OK);
    }
    if (sessions.empty()) continue;
    shared += sessions.size() > 1 ? 1 : 0;
    CHECK_EQ(lococo_batch_step(batch, sessions.data(), ids.data(), sessions.size()), LOCOCO_OK);
    for (size_t i = 0; i < kSessions; ++i) CHECK(outcome(together[i], {}) == outcome(alone[i], {}));
  }
  CHECK(shared > 100);

  for (size_t i = 0; i < kSessions; ++i) {
    if (joined[i]) CHECK_EQ(lococo_batch_remove(batch, together[i]), LOCOCO_OK);
  }
  for (const char* how : {"dying of 1", "dying late of 1"}) {
    for (size_t i = 0; i < 2; ++i) CHECK_EQ(lococo_batch_add(batch, together[i]), LOCOCO_OK);
    const int32_t bad[] = {2, info.vocab_size};
    const int32_t ids[] = {1, 2};
    CHECK_EQ(lococo_batch_step(batch, together, bad, 2), LOCOCO_ERROR_INVALID_ARGUMENT);
    CHECK(outcome(together[0], {}) == outcome(alone[0], {}));
    setenv("FAKE_TRT", how, 1);
    CHECK_EQ(lococo_batch_step(batch, together, ids, 2), LOCOCO_ERROR_BACKEND);
    CHECK(std::string(lococo_last_error()).find("CUDA") != std::string::npos);
    unsetenv("FAKE_TRT");
    CHECK_EQ(lococo_session_step(alone[1], ids[1]), LOCOCO_OK);
    CHECK(outcome(together[1], {}) == outcome(alone[1], {}));
    CHECK_EQ(lococo_batch_step(batch, together, ids, 2), LOCOCO_ERROR_DEAD);
    CHECK(outcome(together[1], {}) == outcome(alone[1], {}));
    for (size_t i = 0; i < 2; ++i) CHECK_EQ(lococo_batch_remove(batch, together[i]), LOCOCO_OK);
    for (lococo_session* s : {together[0], alone[0]}) {
      CHECK_EQ(lococo_session_reset(s), LOCOCO_OK);
      CHECK_EQ(lococo_session_step(s, 5), LOCOCO_OK);
    }
  }
  for (size_t i = 0; i < 2; ++i) CHECK_EQ(lococo_batch_add(batch, together[i]), LOCOCO_OK);
  lococo_batch_destroy(batch);
  for (size_t i = 0; i < kSessions; ++i) {
    CHECK_EQ(lococo_session_step(together[i], 1), LOCOCO_OK);
    CHECK_EQ(lococo_session_step(alone[i], 1), LOCOCO_OK);
    CHECK(outcome(together[i], {}) == outcome(alone[i], {}));
    lococo_session_destroy(together[i]);
    lococo_session_destroy(alone[i]);
  }
  lococo_model_close(model);
}

// Engines of fewer widths: forwards keep to them, and the logits of every token are refused beforehand.
void fewer_engines(const Bundle& b) {
  b.clear();
  EnginesText e = b.text;
  e.plans.pop_back();  // lm_head
  b.engines("one", e);
  lococo_model* model = nullptr;
  lococo_session* s = nullptr;
  const lococo_options o = options();
  CHECK_EQ(lococo_model_open(b.dir.path().c_str(), &o, &model), LOCOCO_OK);
  if (model == nullptr) return;
  CHECK_EQ(lococo_session_create(model, &s), LOCOCO_OK);
  std::vector<float> all(static_cast<size_t>(b.manifest.vocab_size));
  const int32_t id = 1;
  CHECK_EQ(lococo_session_prefill(s, &id, 1, all.data()), LOCOCO_ERROR_UNSUPPORTED);
  CHECK(std::string(lococo_last_error()).find("lm_head_3") != std::string::npos);
  CHECK_EQ(lococo_session_step(s, id), LOCOCO_OK);
  lococo_session_destroy(s);
  lococo_model_close(model);
}

}  // namespace

int main() {
  choosing();
  layout();
  if (std::getenv("FAKE_TRT_MODULE") != nullptr) {
    const Bundle b;
    b.engines("one", b.text);
    opening(b);
    windows(b);
    cancelling(b);
    batches(b);
    fewer_engines(b);
  } else {
    std::printf("run by ctest, which names the stand-ins, it does more\n");
  }
  return finish();
}
