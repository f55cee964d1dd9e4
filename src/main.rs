//! The `eniup` command.

/// musl's own allocator takes twice the time of a run.
#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: dlmalloc::GlobalDlmalloc = dlmalloc::GlobalDlmalloc;

fn main() {
    std::process::exit(eniup::cli::run() as i32);
}
