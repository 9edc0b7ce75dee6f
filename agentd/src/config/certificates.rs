//! Files of certificates that a configuration names.

use std::path::Path;

use super::{ConfigError, value::Table};
use crate::tls;

/// Whether the file that `ca_file` of a table names is one of certificates: the start would fail otherwise.
pub(super) fn check(table: &Table<'_>, path: &Path) -> Result<(), ConfigError> {
    tls::check(path).map_err(|error| table.error_at("ca_file", error.to_string()))
}
