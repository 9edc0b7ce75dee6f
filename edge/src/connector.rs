//! [`Connections`] as the HTTP client of the SDK. Enters: a request of the SDK. Leaves: its answer, or what the SDK goes by
//! when it decides about another attempt.

use std::error::Error as _;

use aws_smithy_runtime_api::client::{
    http::{HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpConnector},
    orchestrator::{HttpRequest, HttpResponse},
    result::ConnectorError,
    runtime_components::RuntimeComponents,
};
use aws_smithy_types::{body::SdkBody, retry::ErrorKind};

use crate::connections::{Bounds, Connections, SendError};

/// The most bytes of an answer: the largest are DynamoDB's of 16 MB of items, with the escapes of JSON.
const ANSWER_BYTES: usize = 64 * 1024 * 1024;

/// The client.
#[derive(Debug)]
pub(crate) struct Client(pub(crate) Connections<SdkBody>);

#[derive(Debug)]
struct Connector {
    connections: Connections<SdkBody>,
    bounds: Bounds,
}

impl HttpClient for Client {
    fn http_connector(
        &self,
        settings: &HttpConnectorSettings,
        _components: &RuntimeComponents,
    ) -> SharedHttpConnector {
        SharedHttpConnector::new(Connector {
            connections: self.0.clone(),
            bounds: Bounds {
                connect: settings.connect_timeout(),
                // Where it is no matter of the attempt: credentials of a task of ECS.
                answer: settings.read_timeout(),
                bytes: ANSWER_BYTES,
            },
        })
    }
}

impl HttpConnector for Connector {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let (connections, bounds) = (self.connections.clone(), self.bounds);
        HttpConnectorFuture::new(async move {
            let request = request.try_into_http1x().map_err(|error| ConnectorError::user(error.into()))?;
            let answer = connections.send(request, bounds).await.map_err(failed)?;
            HttpResponse::try_from(answer.map(SdkBody::from))
                .map_err(|error| ConnectorError::other(error.into(), None))
        })
    }
}

/// What an error means for another attempt.
fn failed(error: SendError) -> ConnectorError {
    let is_io = |error: &hyper::Error| {
        error.is_closed()
            || error.is_canceled()
            || error.source().is_some_and(|source| source.is::<std::io::Error>())
    };
    match &error {
        SendError::Late => ConnectorError::timeout(error.into()),
        SendError::Connect(_) => ConnectorError::io(error.into()),
        SendError::NoHost => ConnectorError::user(error.into()),
        SendError::TooLong => ConnectorError::other(error.into(), None),
        SendError::Http(http) if http.is_user() => ConnectorError::user(error.into()),
        SendError::Http(http) if http.is_incomplete_message() => {
            ConnectorError::other(error.into(), Some(ErrorKind::TransientError))
        }
        SendError::Http(http) if is_io(http) => ConnectorError::io(error.into()),
        SendError::Http(_) => ConnectorError::other(error.into(), None),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;

    const BOUNDS: Bounds = Bounds { connect: None, answer: None, bytes: 5 };

    /// What a call comes to whose server answers so and hangs up.
    async fn outcome(scheme: &str, answer: Option<&'static str>) -> Result<String, ConnectorError> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("{scheme}://{}/", listener.local_addr().unwrap());
        let serve = async move {
            let Some(answer) = answer else { return drop(listener) };
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut buffer = [0; 4096];
            let mut came = Vec::new();
            while scheme == "http" && !came.ends_with(b"{}") {
                let read = stream.read(&mut buffer).await.unwrap();
                came.extend_from_slice(&buffer[..read]);
            }
            stream.write_all(answer.as_bytes()).await.unwrap();
        };
        let mut request = HttpRequest::new(SdkBody::from("{}"));
        request.set_method("POST").unwrap();
        request.set_uri(url).unwrap();
        let connector = Connector { connections: Connections::new(true), bounds: BOUNDS };
        let (outcome, ()) = tokio::join!(connector.call(request), serve);
        outcome.map(|answer| String::from_utf8(answer.body().bytes().unwrap().to_vec()).unwrap())
    }

    #[tokio::test]
    async fn the_sdk_is_told_what_an_error_means_for_another_attempt() {
        assert_eq!(outcome("http", Some("HTTP/1.1 200 OK\r\n\r\nwhole")).await.unwrap(), "whole");
        let long = outcome("http", Some("HTTP/1.1 200 OK\r\n\r\nlonger")).await.unwrap_err();
        assert!(long.is_other() && long.as_other().is_none(), "{long:?}");
        let error = outcome("http", None).await.unwrap_err();
        assert!(error.is_io(), "{error:?}");
        let error = outcome("https", Some("this is no TLS")).await.unwrap_err();
        assert!(error.is_io(), "{error:?}");
        for cut in ["", "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhal"] {
            let error = outcome("http", Some(cut)).await.unwrap_err();
            assert!(error.is_io() || error.as_other() == Some(ErrorKind::TransientError), "{error:?}");
        }
        let error = outcome("http", Some("this is no HTTP\r\n\r\n")).await.unwrap_err();
        assert!(error.is_other() && error.as_other().is_none(), "{error:?}");
        let mut request = HttpRequest::new(SdkBody::empty());
        request.set_uri("/nowhere").unwrap();
        let connector = Connector { connections: Connections::new(true), bounds: BOUNDS };
        assert!(connector.call(request).await.unwrap_err().is_user());
        // It takes the connection and says nothing.
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut request = HttpRequest::new(SdkBody::empty());
        request.set_uri(format!("http://{}/", silent.local_addr().unwrap())).unwrap();
        let bounds = Bounds { answer: Some(Duration::from_millis(20)), ..BOUNDS };
        let connector = Connector { bounds, ..connector };
        assert!(connector.call(request).await.unwrap_err().is_timeout());
    }
}
