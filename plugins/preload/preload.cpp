//! \file
//! For programs that only dlopen() a plugin library, and ask it for nothing: Polygraphy's `--plugins`, Triton Inference Server's
//! `plugins=`. When this library is loaded, it has the TensorRT of the process load libllama_export_plugins.so from its own
//! folder. That library cannot register itself: TensorRT refuses creators that are there already when it loads one properly.

#include "old_glibc.h"

#include <cstdio>
#include <cstring>
#include <dlfcn.h>

namespace
{
struct TensorRt
{
    char const* name; //!< of its library, as the loader knows it
    //! Position of IPluginRegistry::loadLibrary() in the table of virtual functions. TensorRT 11 and TensorRT-RTX dropped four
    //! deprecated functions that come before it.
    int loadLibrary;
};

constexpr TensorRt kKNOWN[] = {
    {"libnvinfer.so.11", 6}, {"libnvinfer_lean.so.11", 6}, {"libtensorrt_rtx.so.1", 6},
    {"libnvinfer.so.10", 10}, {"libnvinfer_lean.so.10", 10},
};
constexpr char const* kWHO = "llama_export_plugins_preload";
constexpr char const* kLIBRARY = "libllama_export_plugins.so";

//! Path of the plugin library, in this library's folder; whether it fits.
bool findLibrary(char* path, size_t size) noexcept
{
    Dl_info here{};
    if (dladdr(&kKNOWN, &here) == 0 || here.dli_fname == nullptr)
    {
        return false;
    }
    char const* const slash = std::strrchr(here.dli_fname, '/');
    int const folder = slash == nullptr ? 0 : static_cast<int>(slash + 1 - here.dli_fname);
    int const length = std::snprintf(path, size, "%.*s%s", folder, here.dli_fname, kLIBRARY);
    return length > 0 && static_cast<size_t>(length) < size;
}

__attribute__((constructor)) void registerPlugins() noexcept
{
    char path[4096];
    if (!findLibrary(path, sizeof path))
    {
        std::fprintf(stderr, "%s: got no path of its own, expected %s beside it\n", kWHO, kLIBRARY);
        return;
    }
    bool found = false;
    for (TensorRt const& known : kKNOWN)
    {
        void* const library = dlopen(known.name, RTLD_NOW | RTLD_NOLOAD);
        if (library == nullptr)
        {
            continue;
        }
        using GetPluginRegistry = void* (*)() noexcept;
        auto const getPluginRegistry = reinterpret_cast<GetPluginRegistry>(dlsym(library, "getPluginRegistry"));
        void* const registry = getPluginRegistry != nullptr ? getPluginRegistry() : nullptr;
        if (registry != nullptr)
        {
            found = true;
            using LoadLibrary = void* (*)(void* registry, char const* path) noexcept;
            void* const* const functions = *static_cast<void* const* const*>(registry);
            if (reinterpret_cast<LoadLibrary>(functions[known.loadLibrary])(registry, path) == nullptr)
            {
                std::fprintf(stderr, "%s: %s did not take `%s`; hint: its log says why; loaded twice?\n", kWHO, known.name, path);
            }
        }
        dlclose(library);
    }
    if (!found)
    {
        std::fprintf(stderr,
            "%s: got a process without TensorRT, expected TensorRT 10, 11 or TensorRT-RTX 1 to be loaded already; hint: load "
            "this library later, not by LD_PRELOAD\n",
            kWHO);
    }
}
} // namespace
