//! Files of certificates that a configuration names.

use std::path::Path;

use super::{ConfigError, value::Table};
use crate::tls::Certificates;

/// Reads the file that `ca_file` of a table names.
pub(super) fn read(table: &Table<'_>, path: &Path) -> Result<Certificates, ConfigError> {
    Certificates::read(path).map_err(|error| table.error_at("ca_file", error.to_string()))
}
