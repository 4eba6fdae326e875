// Working memory that a calling thread keeps: nothing is allocated per token.
#pragma once
#include <cstdlib>
#include <new>

class Scratch {
public:
    ~Scratch() { std::free(data_); }
    // At least `bytes`, aligned to cache lines; what was there is lost.
    template <class T>
    T* get(size_t count) {
        const size_t bytes = (count * sizeof(T) + 4095) / 4096 * 4096;
        if (bytes > size_) {
            std::free(data_);
            size_ = 0;
            data_ = std::aligned_alloc(4096, bytes);
            if (!data_) throw std::bad_alloc();
            size_ = bytes;
        }
        return static_cast<T*>(data_);
    }

private:
    void* data_ = nullptr;
    size_t size_ = 0;
};
