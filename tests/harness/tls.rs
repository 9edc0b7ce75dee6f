//! TLS as an upstream or a front of a test speaks it, for `localhost`.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tokio_rustls::TlsAcceptor;

/// A file of the agent's own tests: a certificate for `localhost` (`localhost.pem`), its key (`localhost.key`), or the
/// authority that signed it (`ca.pem`). The path is absolute, as configurations and environments of programs need it.
pub fn fixture(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../agentd/tests/fixtures");
    folder.join(name).canonicalize().unwrap()
}

/// The server's side, with a certificate that the fixture's authority signed, and what it offers by ALPN, best first.
pub fn acceptor(protocols: &[&[u8]]) -> TlsAcceptor {
    let chain =
        CertificateDer::pem_file_iter(fixture("localhost.pem")).unwrap().map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_file(fixture("localhost.key")).unwrap();
    let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    TlsAcceptor::from(Arc::new(config))
}
