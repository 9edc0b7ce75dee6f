//! Prints `docs/cost.md`; with `measure`, counts the calls anew and rewrites `cost/calls.toml` first.

use std::io::Write as _;

fn main() -> anyhow::Result<()> {
    match std::env::args().nth(1).as_deref() {
        None => {
            // Whoever reads may have gone.
            let _ = std::io::stdout().lock().write_all(cost::page()?.as_bytes());
            Ok(())
        }
        Some("measure") => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let measured = runtime.block_on(cost::measure::measure());
            let file = concat!(env!("CARGO_MANIFEST_DIR"), "/calls.toml");
            let text = format!(
                "# Counted by `cargo run -p cost -- measure` with `local`: calls of AWS for one of each.\n\n{}",
                toml::to_string(&measured)?
            );
            std::fs::write(file, text)?;
            Ok(())
        }
        Some(other) => anyhow::bail!("`{other}` is neither nothing nor `measure`"),
    }
}
