//! The `eniup` command.

fn main() {
    std::process::exit(eniup::cli::run() as i32);
}
