// engines.json of a TensorRT engine folder, against the bundle of the test data, whose id stands for BUNDLE_ID.
#include "fuzz.h"
#include "trt/engines.h"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const lococo::Manifest manifest = [] {
    lococo::Manifest m = lococo::read_manifest(LOCOCO_TEST_DATA);
    m.directory = scratch();
    std::filesystem::create_directories(scratch() + "/engines/one");
    return m;
  }();
  std::string text(reinterpret_cast<const char*>(data), size);
  if (const size_t at = text.find("BUNDLE_ID"); at != std::string::npos) text.replace(at, 9, manifest.bundle_id);
  write_text(scratch() + "/engines/one/engines.json", text);
  for (const int32_t sm : {90, 87}) {
    const Outcome o = outcome_of([&] {
      const lococo::trt::Engines engines = lococo::trt::choose_engines(manifest, {"10.3.0", sm, "a device"});
      REQUIRE(engines.widths.front() == 1 && engines.widths.back() == manifest.block_size);
      for (const lococo::trt::Plan& plan : engines.plans) {
        REQUIRE(plan.path.rfind(scratch() + "/engines/one/", 0) == 0);
        for (const lococo::trt::WeightInput& w : plan.weights) {
          REQUIRE(w.offset >= engines.weights_offset);
          REQUIRE(w.offset + w.tensor.nbytes() <= engines.weights_offset + engines.weights_bytes);
        }
      }
    });
    if (o.status != LOCOCO_OK) REQUIRE(o.text.find("engines/one") != std::string::npos);
  }
  return 0;
}
