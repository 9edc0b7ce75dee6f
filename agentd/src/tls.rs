//! TLS settings: which roots are trusted, for upstreams and for the edge.

use std::{io, path::Path, sync::Arc};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _},
    server::ParsedCertificate,
};

use crate::regular_file;

/// Whom to believe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust<'a> {
    /// The system's roots.
    System,
    /// The system's roots and these: whom they sign, and each of them itself.
    SystemAnd(&'a Certificates),
    /// Anybody. Only where the operator said so.
    Anybody,
}

/// The certificates of a PEM file, as they were when it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificates(Vec<CertificateDer<'static>>);

impl Certificates {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// [`TlsError`] when it is not there, or holds none or one that cannot be trusted.
    pub fn read(path: &Path) -> Result<Self, TlsError> {
        let shown = || path.display().to_string();
        let pem = regular_file::read(path).map_err(|source| TlsError::Read { path: shown(), source })?;
        let certificates = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>().map(Self);
        let certificates = certificates.map_err(|_| TlsError::NoCertificate(shown()))?;
        if certificates.0.is_empty() || certificates.add_to(&mut RootCertStore::empty()).is_err() {
            return Err(TlsError::NoCertificate(shown()));
        }
        Ok(certificates)
    }

    fn add_to(&self, roots: &mut RootCertStore) -> Result<(), rustls::Error> {
        self.0.iter().try_for_each(|certificate| roots.add(certificate.clone()))
    }
}

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The file cannot be read.
    #[error("cannot read certificates from {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The file holds no usable certificate.
    #[error("{0} holds no certificate in PEM form")]
    NoCertificate(String),
    /// A host that no certificate can be for.
    #[error("{0} is not a name that a certificate can be for: set server_name")]
    NotAName(String),
    /// The library refuses the settings.
    #[error("cannot set up TLS: {0}")]
    Settings(#[from] rustls::Error),
}

/// Builds client settings that offer `alpn`.
///
/// # Errors
///
/// [`TlsError`] when the library refuses them.
pub fn client_config(trust: Trust<'_>, alpn: &[&[u8]]) -> Result<Arc<ClientConfig>, TlsError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder =
        ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let config = match trust {
        Trust::Anybody => builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(NoVerifier(provider)))
            .with_no_client_auth(),
        Trust::System | Trust::SystemAnd(_) => {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            let Trust::SystemAnd(certificates) = trust else {
                return Ok(finish(builder.with_root_certificates(roots).with_no_client_auth(), alpn));
            };
            certificates.add_to(&mut roots)?;
            let webpki = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
                .build()
                .map_err(|error| rustls::Error::General(error.to_string()))?;
            let verifier = Arc::new(NamedVerifier { webpki, named: certificates.0.clone() });
            builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth()
        }
    };
    Ok(finish(config, alpn))
}

fn finish(mut config: ClientConfig, alpn: &[&[u8]]) -> Arc<ClientConfig> {
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Arc::new(config)
}

/// What helps against a certificate that was refused, or against a server that does not speak TLS.
#[must_use]
pub fn advice(error: &rustls::Error) -> Option<&'static str> {
    Some(match error {
        rustls::Error::InvalidCertificate(refused) => match refused {
            CertificateError::UnknownIssuer => {
                "name the authority that signed it, or the certificate itself, in ca_file"
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                "set server_name to a name that it has, or make one with this name: \
                 openssl req -x509 -newkey rsa:2048 -nodes -days 365 -keyout key.pem -out cert.pem \
                 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "renew it, or set this machine's clock"
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "set this machine's clock, or that of whoever made it"
            }
            other if is_ca_as_server(other) => {
                "it is marked as an authority's own: name exactly this certificate in ca_file, or make one without CA:TRUE \
                 (openssl req -x509 … -addext basicConstraints=CA:FALSE)"
            }
            _ => return None,
        },
        rustls::Error::InvalidMessage(_) => "the service does not speak TLS: use http://",
        rustls::Error::AlertReceived(rustls::AlertDescription::CertificateRequired) => {
            "the service asks for a client's certificate, and agentd has none"
        }
        rustls::Error::PeerIncompatible(_) => {
            "the service knows neither TLS 1.2 nor 1.3, or nothing of what is offered there"
        }
        _ => return None,
    })
}

/// Whether a certificate was refused only because it is an authority's own. The library has no variant for it.
fn is_ca_as_server(error: &CertificateError) -> bool {
    matches!(error, CertificateError::Other(other) if other.to_string().contains("CaUsedAsEndEntity"))
}

/// Trusts whom the roots sign, and each certificate that is named itself: `openssl req -x509` marks what it makes as an
/// authority's own, and the server that shows it has not been signed by it. OpenSSL and Go take it too.
#[derive(Debug)]
struct NamedVerifier {
    webpki: Arc<WebPkiServerVerifier>,
    named: Vec<CertificateDer<'static>>,
}

impl ServerCertVerifier for NamedVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let refused = match self.webpki.verify_server_cert(end_entity, intermediates, server_name, ocsp, now)
        {
            Err(rustls::Error::InvalidCertificate(refused)) => refused,
            other => return other,
        };
        // Both are found out after the time was checked, and before the name is.
        let but_for_its_issuer = refused == CertificateError::UnknownIssuer || is_ca_as_server(&refused);
        if !but_for_its_issuer || !self.named.contains(end_entity) {
            return Err(rustls::Error::InvalidCertificate(refused));
        }
        verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.webpki.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.webpki.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

/// Accepts every certificate; signatures are still checked.
#[derive(Debug)]
struct NoVerifier(Arc<CryptoProvider>);

impl ServerCertVerifier for NoVerifier {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
