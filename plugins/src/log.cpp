#include "log.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>

namespace llama_export
{
namespace
{
std::atomic<nvinfer1::ILoggerFinder*> gLoggerFinder{nullptr};
constexpr int kMAX_MESSAGE = 1024; //!< bytes; a longer sentence is cut

std::mutex gLatestMutex;
char gLatest[kMAX_MESSAGE] = "";
} // namespace

void useLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept
{
    gLoggerFinder.store(finder);
}

void reportError(char const* plugin, char const* format, ...) noexcept
{
    char message[kMAX_MESSAGE] = "";
    int const prefix = std::snprintf(message, sizeof message, "%s: ", plugin);
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(message + prefix, sizeof message - static_cast<size_t>(prefix), format, arguments);
    va_end(arguments);
    {
        std::lock_guard<std::mutex> const lock(gLatestMutex);
        std::memcpy(gLatest, message, sizeof message);
    }

    nvinfer1::ILoggerFinder* const finder = gLoggerFinder.load();
    nvinfer1::ILogger* const logger = finder != nullptr ? finder->findLogger() : nullptr;
    if (logger != nullptr)
    {
        logger->log(nvinfer1::ILogger::Severity::kERROR, message);
    }
    else
    {
        std::fprintf(stderr, "llama_export_plugins: %s\n", message);
    }
}

int32_t takeError(char* buffer, int32_t size) noexcept
{
    std::lock_guard<std::mutex> const lock(gLatestMutex);
    int32_t const length = static_cast<int32_t>(std::strlen(gLatest));
    if (buffer != nullptr && size > 0)
    {
        std::snprintf(buffer, static_cast<size_t>(size), "%s", gLatest);
        gLatest[0] = '\0';
    }
    return length;
}
} // namespace llama_export
