import streamlit

rows = streamlit.slider("rows", 1, 20, 5)
streamlit.write(f"rows: {rows}")
streamlit.bar_chart(list(range(1, rows + 1)))
