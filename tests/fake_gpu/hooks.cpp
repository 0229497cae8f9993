// Lets a build of PyTorch without CUDA hold tensors of CUDA devices in fake mode: hooks that say that eight devices are
// there, a device guard that does nothing, and the choice of attention that a CUDA build makes where all kernels fit.
#include <ATen/Context.h>
#include <ATen/SDPBackend.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/FakeGuardImpl.h>

namespace at {
struct FakeHooks : CUDAHooksInterface {
  explicit FakeHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 8; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
C10_REGISTER_CLASS_WITH_PRIORITY(CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, FakeHooks)
}  // namespace at

namespace {

int64_t choose_attention(const at::Tensor& query, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                         double, bool, std::optional<double>, bool) {
  // Of the kernels that are on: flash for 16 bits, memory-efficient for 32. There is no cuDNN.
  bool half = query.scalar_type() == at::kBFloat16 || query.scalar_type() == at::kHalf;
  const auto& context = at::globalContext();
  if (half && context.userEnabledFlashSDP()) return int64_t(at::SDPBackend::flash_attention);
  if (!half && context.userEnabledMemEfficientSDP()) return int64_t(at::SDPBackend::efficient_attention);
  TORCH_CHECK(context.userEnabledMathSDP(), "No available kernel. Aborting execution.");
  return int64_t(at::SDPBackend::math);
}

}  // namespace

// Called once torch is there, since a CUDA build has its own.
extern "C" void replace_guard() {
  static c10::impl::FakeGuardImpl<c10::DeviceType::CUDA> guard;
  c10::impl::registerDeviceGuard(c10::DeviceType::CUDA, &guard);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(choose_attention);
}
